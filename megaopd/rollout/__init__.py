"""Where samples come from: engines that implement `megaopd.protocols.RolloutEngine`."""
