"""Ends a run in which a rank hangs or dies, and says which one, where, and what all were doing.

A thread of every rank tells rank 0 every two seconds, and when it changes, what its main thread is
at. Connections are sockets of the watchdog's own: a process that ends is noticed at once, one that
stops by its silence, a phase that takes too long by its deadline.

    phases      what the main thread is at, and for how long
    wire        JSON lines between the ranks and rank 0
    judge       from what rank 0 hears to a verdict; no threads, no sockets
    stacks      what all threads of a process are doing
    watchdog    the thread
"""

from megaopd.watchdog.watchdog import Watchdog

__all__ = ["Watchdog"]
