"""What a run costs before it is started: bytes, traffic and time of a layout, by arithmetic alone.

`python -m megaopd.plan` is its command line. Knows config.json, the parameter mappings and the
arithmetic of layouts; needs neither a GPU nor weights nor a process group, and no Megatron.
"""
