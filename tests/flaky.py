"""An S3 server that stumbles: a proxy before a real one."""

from __future__ import annotations

import http.client
import http.server
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

SLOW_S = 1.0
HOP_HEADERS = ("transfer-encoding", "content-length", "connection", "date", "server")
NO_FAULT: Sequence[str] = ("",)
NO_FAREWELL = struct.pack("ii", 1, 0)  # closing sends RST


class FlakyProxy:
    """An HTTP server before another one that fails in the listed ways, one for each request.

    A fault is a status such as "503", "drop" (the connection ends without an answer), "reset",
    "cut" (in the middle of the answer) or "slow" (SLOW_S later); "" is none. Once the list is used
    up, each request draws one of `meanwhile`, where there are any.
    """

    def __init__(
        self,
        target: str,
        faults: Sequence[str] = (),
        *,
        conditional: bool = False,
        address: str = "127.0.0.1",
        seed: int = 0,
    ) -> None:
        self.target, self.conditional = urlsplit(target).netloc, conditional
        self.faults, self.meanwhile = list(faults), NO_FAULT
        self.random = random.Random(seed)
        self.met: Counter[str] = Counter()
        self.put_keys: set[str] = set()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                proxy.answer(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = do  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer((address, 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://{address}:{self.server.server_address[1]}"

    def __enter__(self) -> FlakyProxy:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        fault = self.faults.pop(0) if self.faults else self.random.choice(self.meanwhile)
        self.met[fault] += 1
        if self.conditional and request.headers.get("If-None-Match"):
            fault = "412" if request.path in self.put_keys else ""
            self.put_keys.add(request.path)
        if fault == "slow":
            time.sleep(SLOW_S)
        if fault in ("drop", "reset"):
            if fault == "reset":
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_FAREWELL)
            request.close_connection = True
        elif fault.isdigit():
            request.send_response(int(fault))
            request.send_header("Content-Length", "0")
            request.end_headers()
        else:
            self.forward(request, body, cut=fault == "cut")

    def forward(
        self, request: http.server.BaseHTTPRequestHandler, body: bytes, *, cut: bool
    ) -> None:
        connection = http.client.HTTPConnection(self.target, timeout=60)
        # The signature covers Host, so it goes on as it came.
        connection.putrequest(
            request.command, request.path, skip_host=True, skip_accept_encoding=True
        )
        for name, value in request.headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_HEADERS:
                request.send_header(name, value)
        # What came in chunks is sent in one; the answer to HEAD tells a length and has none.
        length = answer.getheader("Content-Length") if request.command == "HEAD" else len(data)
        request.send_header("Content-Length", str(length or 0))
        request.end_headers()
        request.wfile.write(data[: len(data) // 2] if cut else data)
        request.close_connection = cut
        connection.close()
