"""Asks the server of `warm.py` for a process, hands it this one's streams, and ends with its exit code."""

from __future__ import annotations

import json
import os
import socket
import sys

address, python, site, *arguments = sys.argv[1:]
told = {"python": python, "site": site, "arguments": arguments, "folder": os.getcwd(), "env": dict(os.environ)}
request = json.dumps(told).encode()
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(address)
    socket.send_fds(connection, [len(request).to_bytes(8, "little")], [0, 1, 2])
    connection.sendall(request)
    answer = connection.recv(1)
sys.exit(answer[0] if answer else "the process died")
