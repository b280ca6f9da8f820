"""https: with a certificate that can be changed while the daemon serves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from helpers.daemon import COMMAND, Daemon
from helpers.documents import Shell, fenced, text, typed
from helpers.script import Script
from helpers.waiting import DEADLINE_S, until

from harnessd import offline

TLS = 'tls = {cert = "cert.pem", key = "key.pem"}'


class Authority:
    """Certificates that are their own authorities, made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("first", "second"):
            self._run("req", "-x509", *self._new_key(name), "-days", "2", "-out", f"{name}.pem", *self._subject)
        self._run("req", "-new", "-key", "first.key", "-out", "first.csr", *self._subject)
        self._run("x509", "-req", "-in", "first.csr", "-signkey", "first.key", "-days", "-1", "-out", "expired.pem")
        self._run("ec", "-in", "first.key", "-aes128", "-passout", "pass:secret", "-out", "encrypted.key")

    _subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")

    def _new_key(self, name: str) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]

    def _run(self, *args: str) -> None:
        subprocess.run(["openssl", *args], cwd=self._folder, check=True, capture_output=True, timeout=DEADLINE_S)

    def path(self, name: str) -> Path:
        return self._folder / name

    def install(self, daemon: Daemon, cert: str = "first.pem", key: str = "first.key") -> None:
        shutil.copy(self.path(cert), daemon.config / "cert.pem")
        shutil.copy(self.path(key), daemon.config / "key.pem")

    def client(self, daemon: Daemon, trusted: str = "first.pem") -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.path(trusted)))
        url = f"https://localhost:{daemon.port}"
        return httpx.Client(base_url=url, verify=context, timeout=DEADLINE_S, trust_env=False)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


class Secure(Daemon):
    """The helper asks it without looking at its certificate."""

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"


@pytest.fixture
def secure(tmp_path: Path, authority: Authority) -> Iterator[Daemon]:
    made = Secure(tmp_path)
    authority.install(made)
    made.settings(http=TLS)
    yield made
    made.close()


def shown(daemon: Daemon, authority: Authority, trusted: str) -> bool:
    """Return whether new connections are made with the certificate."""
    with authority.client(daemon, trusted) as client:
        try:
            return client.get("/healthz").is_success
        except httpx.ConnectError:
            return False


def test_https_alone_is_spoken_on_the_port_and_http_on_the_unix_socket(secure: Daemon, authority: Authority) -> None:
    secure.job("job", "Idle")
    secure.start()
    assert f"https://127.0.0.1:{secure.port}" in secure.log
    with authority.client(secure) as client:
        assert client.get("/jobs/job/hb").status_code in (200, 503)
        assert client.post("/jobs/job/config", json={"text": "x" * 50_000}).status_code == 202
        assert client.post("/jobs/job/config", content=b"x" * 2_000_000).status_code == 413
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{secure.port}/healthz", trust_env=False)
    with closing(socket.socket(socket.AF_UNIX)) as local:
        local.connect(str(secure.state / "harnessd.sock"))
        local.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert local.recv(100).startswith(b"HTTP/1.1 200")

    context = ssl.create_default_context(cafile=str(authority.path("first.pem")))
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("127.0.0.1", secure.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        assert connection.version() == "TLSv1.3"
        assert connection.selected_alpn_protocol() == "http/1.1"
    old = ["openssl", "s_client", "-connect", f"localhost:{secure.port}", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]
    said = subprocess.run(old, input=b"", capture_output=True, timeout=DEADLINE_S)
    assert b"New, (NONE)" in said.stdout


def test_a_reload_puts_a_new_certificate_in_force_and_drops_nobody(secure: Daemon, authority: Authority) -> None:
    secure.start()
    with authority.client(secure) as kept:
        assert kept.get("/healthz").is_success
        authority.install(secure, "second.pem", "second.key")
        secure.tell(signal.SIGHUP)
        secure.wait_for(lambda: shown(secure, authority, "second.pem"), "the new certificate is in force")
        assert not shown(secure, authority, "first.pem")
        authority.install(secure, "expired.pem", "first.key")
        answer = secure.reload()
        assert (answer["refused"], answer["restart_needed"]) == ({}, [])
        assert "cert.pem has expired" in secure.log
        assert not shown(secure, authority, "second.pem")
        assert kept.get("/healthz").is_success  # on its own connection: a new one would not be trusted


def test_a_broken_certificate_leaves_the_one_in_force_and_is_told(secure: Daemon, authority: Authority) -> None:
    secure.start()
    authority.install(secure, "second.pem", "first.key")
    (problem,) = secure.reload()["refused"]["harnessd"]
    assert f"{secure.config}/key.pem does not match {secure.config}/cert.pem" in problem
    assert shown(secure, authority, "first.pem")
    secure.wait_new_server(secure.kill_server())
    assert shown(secure, authority, "first.pem")  # the next server has it from the one before
    authority.install(secure, "second.pem", "second.key")
    assert secure.reload()["refused"] == {}
    assert shown(secure, authority, "second.pem")


@pytest.mark.parametrize(
    ("cert", "key", "told"),
    [
        ("first.pem", "second.key", "key.pem does not match"),
        ("first.key", "first.key", "cert.pem holds no certificate"),
        ("first.pem", "first.pem", "key.pem holds no private key"),
        ("first.pem", "encrypted.key", "key.pem is encrypted"),
        ("first.pem", None, "key.pem cannot be read: no such file"),
    ],
)
def test_a_certificate_that_cannot_be_used_stops_the_start(
    secure: Daemon, authority: Authority, cert: str, key: str | None, told: str
) -> None:
    authority.install(secure, cert, key or cert)
    if key is None:
        (secure.config / "key.pem").unlink()
    ((problem,), _) = offline.problems(secure.config)
    assert problem.startswith(f"{secure.config}/harnessd.toml: http.tls (line 7): {secure.config}/")
    assert told in problem


def test_a_daemon_does_not_start_without_its_certificate(secure: Daemon) -> None:
    (secure.config / "cert.pem").unlink()
    secure.launch()
    assert secure.wait() == 2
    assert f"{secure.config}/cert.pem cannot be read: no such file" in secure.log


def test_check_warns_of_an_expired_certificate(secure: Daemon, authority: Authority) -> None:
    authority.install(secure, "expired.pem", "first.key")
    ran = subprocess.run([COMMAND[0], "check", str(secure.config)], capture_output=True, text=True, timeout=DEADLINE_S)
    assert ran.returncode == 0
    assert "warning: " in ran.stderr
    assert "cert.pem has expired" in ran.stderr


def test_the_command_verifies_the_certificate_which_may_come_and_go_with_a_reload(
    secure: Daemon, authority: Authority
) -> None:
    secure.start()
    command = [COMMAND[0], "--url", f"https://localhost:{secure.port}", "ps"]

    def ran(trusted: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"SSL_CERT_FILE": str(authority.path(trusted))}
        return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=env)

    assert ran("first.pem").returncode == 0
    untrusted = ran("second.pem")
    assert untrusted.returncode == 4
    assert "its certificate is not trusted" in untrusted.stderr

    secure.settings()
    secure.reload()
    assert httpx.get(f"http://127.0.0.1:{secure.port}/healthz", trust_env=False).is_success
    secure.settings(http=TLS)
    assert httpx.post(f"http://127.0.0.1:{secure.port}/reload", trust_env=False).is_success
    assert shown(secure, authority, "first.pem")


def test_a_script_speaks_https_too(start: Callable[..., Script], authority: Authority) -> None:
    body = "class Job(Cradle):\n    def run(self):\n        while True: self.get_msg(timeout=None)"
    tls = {"cert": str(authority.path("first.pem")), "key": str(authority.path("first.key"))}
    script = start(body, config={"http": {"port": 0, "tls": tls}})
    url = until(lambda: re.search(r"listens on (https://\S+)", script.err), "the script listens")[1]
    context = ssl.create_default_context(cafile=str(authority.path("first.pem")))
    assert httpx.get(f"{url}/status", verify=context, trust_env=False, timeout=DEADLINE_S).is_success


def test_what_the_page_on_hardening_tells_to_write_and_to_type_works(daemon: Daemon) -> None:
    page = text("docs/hardening.md")
    shell = Shell(daemon.folder, daemon.port)
    (settings,) = fenced(page, "toml")
    (daemon.config / "harnessd.toml").write_text(
        f'state_dir = "{daemon.state}"\nruntime_dir = "{daemon.folder}/run"\n{shell.here(settings)}'
    )
    made, *asked = [line for block in typed(page) for line in block.splitlines()]
    shell(made)
    daemon.launch()
    daemon.wait_for(lambda: f"https://127.0.0.1:{daemon.port}" in daemon.log, "the daemon serves")
    for command in asked:
        assert shell(command)
