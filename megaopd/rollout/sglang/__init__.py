"""Rollouts from SGLang servers: their protocol, a client, a pool of them, and the engine on top."""
