"""Certificates that would not do are refused before work, and a client trusts what it was told to."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from certificates import Authority, Pair

from modelyard.cli import main
from modelyard.errors import DataError, RecipeError
from modelyard.serving import ServeOptions
from modelyard.serving.server import check
from modelyard.serving.tls import Tls, client_context


def options(pair: Pair, **more: object) -> ServeOptions:
    return ServeOptions(port=0, tls=Tls(certificate=str(pair.certificate), key=str(pair.key)), **more)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


Case = Callable[[Authority, Path], Pair]
BAD: dict[str, tuple[Case, str, str]] = {
    "missing": (lambda a, t: Pair(t / "none.pem", a.issue("x").key), "No such file", "none.pem"),
    "folder": (lambda a, t: Pair(a.issue("x").certificate, t), "Is a directory", ""),
    "another's key": (lambda a, _: Pair(a.issue("x").certificate, a.issue("y").key), "do not belong", "y.key"),
    "password": (lambda a, _: a.issue("x", password=b"secret"), "without a password", "x.key"),
    "swapped": (lambda a, _: Pair(a.issue("x").key, a.issue("x").certificate), "no certificate", "x.key"),
    "no key": (lambda a, _: Pair(a.issue("x").certificate, a.certificate), "no private key", "ca.pem"),
    "expired": (lambda a, _: a.issue("x", days=-1), "expired", "x.pem"),
    "for clients": (lambda a, _: a.issue("x", client=True), "purpose", "x.pem"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_do_not_do_are_refused_before_work(name: str, authority: Authority, tmp_path: Path) -> None:
    make, what, place = BAD[name]
    with pytest.raises(DataError, match=what) as caught:
        check(options(make(authority, tmp_path)))
    assert place in caught.value.place
    assert "PEM" in caught.value.mend or "issued anew" in caught.value.mend


def test_good_files_pass_and_haproxy_is_out(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    good = authority.issue("good")
    assert check(options(good)) is None
    monkeypatch.chdir(good.key.parent)
    relative = Tls(certificate="good.pem", key="good.key")
    assert relative.absolute() == (str(good.certificate), str(good.key))
    assert not ServeOptions(host="0.0.0.0", tls=relative).use_haproxy and ServeOptions(host="0.0.0.0").use_haproxy
    with pytest.raises(RecipeError, match="cannot end TLS"):
        check(options(good, haproxy=True, api_keys=str(keys(good.key.parent))))


def keys(folder: Path) -> Path:
    from modelyard.serving.keys import add_key

    add_key(folder / "keys.txt", "alice")
    return folder / "keys.txt"


def test_the_command_wants_both_files(authority: Authority, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", "x", "--tls-certificate", str(authority.issue("x").certificate)])
    assert end.value.code == 2 and "--tls-key" in capsys.readouterr().err


class Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"data": [{"id": "hello"}]}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_client_trusts_the_authority_or_the_certificate_it_is_given(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair, stranger = authority.issue("server"), Authority(tmp_path / "other")
    server = HTTPServer(("127.0.0.1", 0), Hello)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"https://127.0.0.1:{server.server_port}/v1"
    for trusted in (authority.certificate, pair.certificate):
        assert httpx.get(url, verify=client_context(str(trusted), hostname=True)).status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(url, verify=client_context(str(stranger.certificate)))
    with pytest.raises(SystemExit) as end:
        main(["bench-serve", url, "--ca", str(stranger.certificate), "--rates", "1", "--seconds", "1"])
    assert end.value.code == 2 and "--ca" in capsys.readouterr().err
    server.shutdown()
    server.server_close()
