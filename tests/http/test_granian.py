"""What only a real server shows: a child process with granian, and raw sockets."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from msgspec import Struct

from app.settings import ROOT
from tests.http.conftest import NewKey

START_S = 20.0
STOP_S = 15.0


class Server(Struct):
    """A running web process."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def talk(self, request: bytes) -> bytes:
        """Send these bytes; return what comes until the server closes or is silent for a second."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.sendall(request)
            answer = b""
            try:
                while part := connection.recv(65536):
                    answer += part
            except TimeoutError:
                pass
            return answer


@contextmanager
def serving(postgres_url: str, redis_url: str, directory: Path) -> Generator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {
        **os.environ,
        "WAYBILL_POSTGRES_URL": postgres_url,
        "WAYBILL_REDIS_URL": redis_url,
        "WAYBILL_PORT": str(port),
        "WAYBILL_DATA_DIR": str(directory),
        "WAYBILL_TRACE_RATIO": "0",
    }
    log = directory / "web.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "web"], cwd=ROOT, env=environ, stderr=output
        )
    try:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        yield Server(port, process, log)
    finally:
        process.terminate()
        process.wait(STOP_S)


@pytest.fixture
def server(postgres_url: str, redis_url: str, tmp_path: Path) -> Generator[Server]:
    with serving(postgres_url, redis_url, tmp_path) as server:
        yield server


async def test_a_server_and_raw_bytes(server: Server, new_key: NewKey) -> None:
    """One server for all of it: a start takes seconds."""
    auth = b"Host: waybill\r\nAuthorization: Bearer " + (await new_key()).encode() + b"\r\n"
    end = b"Connection: close\r\n\r\n"
    json = b"Content-Type: application/json\r\nIdempotency-Key: k\r\n"

    head = server.talk(b"HEAD /v1/stock HTTP/1.1\r\n" + auth + end)
    got = server.talk(b"GET /v1/stock HTTP/1.1\r\n" + auth + end)
    assert head.startswith(b"HTTP/1.1 200")
    assert head.endswith(b"\r\n\r\n")
    length = len(got.split(b"\r\n\r\n", 1)[1])
    assert b"content-length: %d\r\n" % length in head.lower()

    broken = server.talk(b"GET /v1/orders/%ff%fe HTTP/1.1\r\n" + auth + end)
    assert broken.startswith(b"HTTP/1.1 404")
    assert b'"not-found"' in broken

    hidden = server.talk(b"GET /v1/orders/%00 HTTP/1.1\r\n" + auth + end)
    assert hidden.startswith(b"HTTP/1.1 404")

    large = b"Content-Length: 104857600\r\n"
    refused = server.talk(b"POST /v1/orders HTTP/1.1\r\n" + auth + json + large + b"\r\n")
    assert refused.startswith(b"HTTP/1.1 413")

    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n" + 20 * chunk + b"0\r\n\r\n"
    refused = server.talk(b"POST /v1/orders HTTP/1.1\r\n" + auth + json + chunked)
    assert refused.startswith(b"HTTP/1.1 413")

    smuggled = b"X-Request-Id: a\r\nX-Request-Id: b\r\n"
    answer = server.talk(b"GET /v1/stock HTTP/1.1\r\n" + auth + smuggled + end)
    assert b"x-request-id: a, b" not in answer.lower()

    assert server.process.poll() is None
    assert b"Traceback" not in server.log.read_bytes()


async def test_a_stop_is_announced_and_cuts_nothing_off(server: Server, new_key: NewKey) -> None:
    headers = {"Authorization": f"Bearer {await new_key()}"}
    statuses: list[int] = []
    closing: list[str] = []
    cut: list[str] = []

    def work() -> None:
        body = {"email": "a@b.c", "name": "Ada"}
        number = 0
        with httpx.Client(base_url=server.url, headers=headers, timeout=10) as http:
            while True:
                number += 1
                key = f"{threading.get_ident()}-{number}"
                try:
                    answer = http.post("/v1/customers", json=body, headers={"Idempotency-Key": key})
                except httpx.ConnectError:
                    return  # it no longer listens
                except httpx.TransportError as error:
                    cut.append(repr(error))
                    return
                statuses.append(answer.status_code)
                closing.append(answer.headers.get("connection", ""))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    await asyncio.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.3)
    async with httpx.AsyncClient() as http:
        ready = await http.get(f"{server.url}/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "draining")
    for thread in threads:
        thread.join(STOP_S)
    assert server.process.wait(STOP_S) == 0
    assert set(statuses) == {201}
    assert closing[0] == ""
    assert closing[-1] == "close"
    assert cut == []


def test_a_second_sigterm_changes_nothing(server: Server) -> None:
    for _ in range(3):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert server.process.wait(STOP_S) == 0
    assert b"Traceback" not in server.log.read_bytes()
