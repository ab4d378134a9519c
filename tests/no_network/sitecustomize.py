"""On the path of a Python process, this makes every way out of the machine fail and writes it down.

An audit hook sees what the interpreter does, whatever name it was called by; the file tells of attempts
whose exception somebody swallowed.
"""

import os
import sys
import traceback

LOOPBACK = ("127.", "::1", "localhost")


def hook(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        if not isinstance(address, tuple) or str(address[0]).startswith(LOOPBACK):
            return  # between processes of this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        if args[0] is None or str(args[0]).startswith(LOOPBACK):
            return
    else:
        return
    with open(os.environ["NETWORK_LOG"], "a") as file:
        file.write(f"{event} {args[1:] if event.startswith('socket.connect') else args}\n")
        file.write("".join(traceback.format_stack(limit=12)))
    raise ConnectionRefusedError(f"{event}: this process may not use the network")


sys.addaudithook(hook)
