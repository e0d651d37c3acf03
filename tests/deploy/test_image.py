"""The image of the Containerfile: it runs read-only, without root and without capabilities, alone and as a replica.

`.ci/container` builds it, and runs these tests.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

import zcproto
from tests.deploy.test_containers import MANIFESTS, POD, SERVER, SERVER_USER
from tests.limits import TIMEOUT
from tests.server.helpers import PATIENT_CLIENT, eventually
from zcproto.auth import UserFile

IMAGE = os.environ.get("ZCPROTO_TEST_IMAGE", "")

pytestmark = pytest.mark.skipif(not IMAGE, reason="needs an image: .ci/container builds it")

RESTRICTED = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges")
"""What the compose file and the manifests say."""


def podman(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["podman", *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


class Container:
    """A running server in a container."""

    def __init__(self, *options: str | Path, command: tuple[str, ...]) -> None:
        self.id = podman("run", "--detach", *RESTRICTED, *options, IMAGE, *command).stdout.strip()
        eventually(self._is_healthy)
        self.port = int(re.search(r"listening on \S+:(\d+)$", self.log(), re.MULTILINE)[1])  # type: ignore[index]

    def _is_healthy(self) -> bool:
        assert self._state("Running") == "true", self.log()
        return podman("healthcheck", "run", self.id, check=False).returncode == 0

    def _state(self, field: str) -> str:
        return podman("inspect", "--format", f"{{{{.State.{field}}}}}", self.id).stdout.strip()

    def until_ready(self) -> None:
        """Wait until the health check says so, which a busy machine may exceed."""
        check = ("exec", self.id, "zcproto", "health", "--ready")
        eventually(lambda: podman(*check, check=False).stdout == "ready\n")

    def exec(self, *command: str) -> str:
        return podman("exec", self.id, *command).stdout

    def log(self) -> str:
        done = podman("logs", self.id)
        return done.stdout + done.stderr

    def status(self) -> dict[str, str]:
        """Return the status of the server's process."""
        lines = self.exec("python3", "-c", "print(open('/proc/1/status').read())").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def stop(self) -> int:
        """End the server by SIGTERM; return its exit code."""
        podman("stop", "--time", str(int(TIMEOUT)), self.id)
        return int(self._state("ExitCode"))


@contextmanager
def running(*options: str | Path, command: tuple[str, ...] = ()) -> Iterator[Container]:
    container = Container(*options, command=command)
    try:
        yield container
    finally:
        podman("rm", "--force", "--volumes", "--time", "0", container.id)


async def drained(container: Container, client: zcproto.Client) -> None:
    """Stop a server while a call runs. The call is answered, and the server ends by itself."""
    call = asyncio.create_task(client.call("sleep", {"ms": 1000}))
    assert await client.call("echo", {"word": "hello"}) == {"word": "hello"}  # the call before has begun
    assert await asyncio.to_thread(container.stop) == 0
    await call
    log = container.log()
    assert '"event":"server.draining"' in log
    ended = [json.loads(line) for line in log.splitlines() if '"event":"server.ended"' in line]
    assert {each["cut_off"] for each in ended} == {0}


@pytest.mark.parametrize("workers", [1, 2])
async def test_image_serves_and_drains_without_root_and_read_only(workers: int, tmp_path: Path) -> None:
    options = [f"--env=ZCPROTO_SERVER__WORKERS={workers}", "--env=ZCPROTO_CERTIFICATES__KEY_TYPES=ecdsa-p256"]
    with running(
        *options, command=("serve", "--host", "::", "--host", "0.0.0.0", "--port", "0")
    ) as container:
        container.until_ready()
        assert "accelerator: in use" in container.exec("zcproto", "--version")
        status = container.status()
        assert {*status["Uid"].split(), *status["Gid"].split()} == {str(SERVER_USER)}
        assert {int(value, 16) for name, value in status.items() if name.startswith("Cap")} == {0}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        write = "import os\ntry: open('/srv/x', 'w')\nexcept OSError as error: print(error.strerror)"
        assert container.exec("python3", "-c", write) == "Read-only file system\n"
        key = container.exec("zcproto", "user", "add", "ada").strip()
        ca = tmp_path / "ca.crt"
        ca.write_text(container.exec("zcproto", "cert", "export-ca", "-"))
        async with zcproto.connect(
            f"localhost:{container.port}", user="ada", key=key, ca_file=ca, **PATIENT_CLIENT
        ) as client:
            await drained(container, client)


# --- as a replica in Kubernetes -------------------------------------------------------------------------------


class Secret:
    """A folder as the kubelet makes it for a Secret, with fsGroup and defaultMode: 0440."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._own(path, 0o1777)

    def publish(self, version: str, files: dict[str, bytes]) -> None:
        """Replace the files in one step: NAME -> ..data/NAME, and ..data -> ..VERSION."""
        folder = self.path / f"..{version}"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
            self._own(folder / name, 0o440)
            if not (self.path / name).is_symlink():
                (self.path / name).symlink_to(f"..data/{name}")
        self._own(folder, 0o2755)
        (self.path / "..data_tmp").symlink_to(folder.name)
        (self.path / "..data_tmp").rename(self.path / "..data")
        for old in self.path.glob("..[!d]*"):
            if old != folder:
                shutil.rmtree(old)

    def _own(self, path: Path, mode: int) -> None:
        os.chown(path, 0, SERVER_USER)
        path.chmod(mode)


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """The port and the password of a Valkey, with the arguments of the manifest."""
    if shutil.which("valkey-server") is None:
        pytest.skip("needs valkey-server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (manifest,) = [each for each in MANIFESTS if each["kind"] == "StatefulSet"]
    arguments = manifest["spec"]["template"]["spec"]["containers"][0]["args"]
    password = "4b1d"
    arguments = [password if each == "$(REDISCLI_AUTH)" else each for each in arguments]
    (tmp_path / "data").mkdir()
    process = subprocess.Popen(
        [*arguments, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path / "data")],
        stdout=subprocess.DEVNULL,
    )
    try:
        yield port, password
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def pem_files(ca: trustme.CA) -> dict[str, bytes]:
    leaf = ca.issue_cert("localhost")
    chain = b"".join(each.bytes() for each in leaf.cert_chain_pems)
    return {"tls.crt": chain, "tls.key": leaf.private_key_pem.bytes()}


def served(port: int, ca: Path) -> bytes | None:
    """Return the certificate that a server shows."""
    context = ssl.create_default_context(cafile=str(ca))
    with (
        socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection,
        context.wrap_socket(connection, server_hostname="localhost") as channel,
    ):
        return channel.getpeercert(binary_form=True)


async def test_replica_serves_rotated_secrets(tmp_path: Path, valkey: tuple[int, str]) -> None:
    os.chmod(tmp_path, 0o755)
    (config,) = [each for each in MANIFESTS if each["kind"] == "ConfigMap"]
    folders: dict[str, Path] = {each["name"]: tmp_path / each["name"] for each in SERVER["volumeMounts"]}
    folders["home"].mkdir()
    folders["home"].chmod(0o777)  # an emptyDir
    folders["config"].mkdir()
    (folders["config"] / "config.toml").write_text(config["data"]["config.toml"])
    secrets = {name: Secret(folders[name]) for name in ("tls", "users", "valkey")}
    ca, ca_file = trustme.CA(), tmp_path / "ca.crt"
    ca.cert_pem.write_to_path(ca_file)
    (tmp_path / "of-operator").mkdir(mode=0o700)
    users = UserFile(tmp_path / "of-operator" / "users.toml")
    key = users.add("ada")
    secrets["tls"].publish("1", pem_files(ca))
    secrets["users"].publish("1", {"users.toml": users.path.read_bytes()})
    secrets["valkey"].publish("1", {"password": valkey[1].encode()})

    def mounts(container: dict[str, Any]) -> Iterator[str]:
        for each in container["volumeMounts"]:
            mode = "ro" if each.get("readOnly") else "rw"
            yield f"--volume={folders[each['name']]}:{each['mountPath']}:{mode}"

    (first,) = POD["initContainers"]
    program, *arguments = [*first["command"], *first["args"]]
    podman("run", "--rm", *RESTRICTED, *mounts(first), f"--entrypoint={program}", IMAGE, *arguments)
    environ = {each["name"]: each["value"] for each in SERVER["env"]}
    environ |= {"ZCPROTO_SERVER__PORT": "0", "ZCPROTO_STORE__URL": f"valkey://127.0.0.1:{valkey[0]}"}
    options = [*mounts(SERVER), *(f"--env={name}={value}" for name, value in environ.items())]
    with running(*options, command=tuple(SERVER["args"])) as container:
        container.until_ready()
        before = served(container.port, ca_file)
        address = f"localhost:{container.port}"
        async with zcproto.connect(address, user="ada", key=key, ca_file=ca_file, **PATIENT_CLIENT) as client:
            assert await client.call("echo", {"word": "hello"}) == {"word": "hello"}
            secrets["tls"].publish("2", pem_files(ca))
            deadline = time.monotonic() + TIMEOUT
            while served(container.port, ca_file) == before:
                assert time.monotonic() < deadline, container.log()
                await asyncio.sleep(0.2)
            grace = users.add("grace")
            secrets["users"].publish("2", {"users.toml": users.path.read_bytes()})
            async with zcproto.connect(
                address, user="grace", key=grace, ca_file=ca_file, **PATIENT_CLIENT
            ) as other:
                assert await other.call("echo", {"word": "new"}) == {"word": "new"}
            await drained(container, client)
        assert '"level":"error"' not in container.log()
