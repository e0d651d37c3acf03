"""The bare yardstick: the least a Python ZCP/1 server can do, for side-by-side measurement.

One TLS 1.3 endpoint on `asyncio.BufferedProtocol` and `ssl.MemoryBIO`, one receive buffer for all
connections, the frame of wire.md, one token known by its digest, the counter and the timestamp
checked, the params echoed. No limits, no handlers, no metrics, no errors to the peer: never use it
for anything but measuring.

usage: bare_server.py PORT CERT_AND_KEY.pem [asyncio|uvloop] [TOKEN_HEX]

The client sends WELCOME's salt back in its nonces. SIGTERM ends it. SIGUSR1 prints one JSON line:
requests served, CPU seconds used, resident MiB.
"""

import asyncio
import gc
import hashlib
import json
import os
import resource
import signal
import ssl
import struct
import sys
import time

import msgpack

HEADER = struct.Struct("!IBBHIQ8sQ32s")  # length version kind flags stream timestamp salt counter token
WELCOME, REQUEST, RESPONSE = 1, 2, 3
NO_TOKEN = bytes(32)
TOLERANCE_MS = 30_000

shared = bytearray(64 * 1024)
view = memoryview(shared)
served = 0


class Bare(asyncio.BufferedProtocol):
    __slots__ = (
        "counter",
        "incoming",
        "known",
        "last",
        "outgoing",
        "ready",
        "rest",
        "salt",
        "tls",
        "transport",
    )

    def connection_made(self, transport):
        self.transport = transport
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.ready, self.rest, self.salt, self.last, self.counter, self.known = (
            False,
            b"",
            os.urandom(8),
            0,
            -1,
            None,
        )  # WELCOME is frame 0

    def get_buffer(self, sizehint):
        return shared

    def buffer_updated(self, count):
        self.incoming.write(view[:count])
        reply = b""
        try:
            if not self.ready:
                self.tls.do_handshake()
                self.ready = True
                reply = self.frame(WELCOME, 0, NO_TOKEN, welcome_body, int(time.time() * 1000))
            while True:
                data = self.tls.read(65536)
                if not data:
                    self.transport.close()
                    return
                reply += self.answer(data)
                if not self.incoming.pending:
                    break
        except ssl.SSLWantReadError:
            pass
        if reply:
            self.tls.write(reply)
        if self.outgoing.pending:
            self.transport.write(self.outgoing.read())

    def frame(self, kind, stream, token, body, now):
        self.counter += 1
        return HEADER.pack(64 + len(body), 1, kind, 0, stream, now, self.salt, self.counter, token) + body

    def answer(self, data):
        global served
        if self.rest:
            data = self.rest + data
        now, size, at, out = int(time.time() * 1000), len(data), 0, []
        while size - at >= 68:
            length, version, kind, flags, stream, stamp, salt, counter, token = HEADER.unpack_from(data, at)
            end = at + 4 + length
            if end > size:
                break
            fresh = salt == self.salt and counter > self.last and -TOLERANCE_MS < now - stamp < TOLERANCE_MS
            if version != 1 or kind != REQUEST or flags or not fresh:
                raise ConnectionError("bad frame")
            if token != self.known:
                if hashlib.sha256(token).digest() != digest:
                    raise ConnectionError("bad token")
                self.known = token
            self.last = counter
            method, params = msgpack.unpackb(data[at + 68 : end])[:2]
            out.append(self.frame(RESPONSE, stream, token, msgpack.packb(params), now))
            served += 1
            at = end
        self.rest = data[at:]
        return b"".join(out)

    def eof_received(self):
        return False

    def connection_lost(self, error):
        pass


def report():
    used = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    line = {
        "served": served,
        "cpu_s": used.ru_utime + used.ru_stime,
        "rss_mib": pages * resource.getpagesize() / 2**20,
    }
    print(json.dumps(line), flush=True)


async def main():
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, over.set)
    loop.add_signal_handler(signal.SIGUSR1, report)
    await loop.create_server(Bare, "127.0.0.1", int(sys.argv[1]), backlog=4096)
    await over.wait()


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.minimum_version = ssl.TLSVersion.TLSv1_3
context.num_tickets = 0
context.set_alpn_protocols(["zcp/1"])
context.load_cert_chain(sys.argv[2])
digest = hashlib.sha256(bytes.fromhex(sys.argv[4]) if len(sys.argv) > 4 else b"k" * 32).digest()
welcome_body = msgpack.packb(
    {
        "server": "bare",
        "versions": [1],
        "max_frame": 1 << 20,
        "max_streams": 128,
        "idle_timeout_ms": 120_000,
        "tolerance_ms": TOLERANCE_MS,
        "sts": {"max_age": 31_536_000, "include_subdomains": False},
    }
)

if __name__ == "__main__":
    gc.freeze()
    if sys.argv[3:4] == ["uvloop"]:
        import uvloop

        uvloop.run(main())
    else:
        asyncio.run(main())
