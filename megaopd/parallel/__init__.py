"""Where the ranks are: device and backend, process groups, and collectives over them."""
