"""One screen about a run, from the files of its directory alone: `python -m megaopd.status RUN`.

It runs anywhere that sees the directory, beside the run or after it, loads neither torch nor the
configuration's machinery, and takes nothing that it reads for more than text and numbers.
"""
