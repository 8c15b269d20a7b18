"""A Slurm cluster of virtual nodes on this machine, and Python that starts in a moment on them."""
