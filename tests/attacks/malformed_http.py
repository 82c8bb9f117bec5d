"""More than 400 requests that no well-behaved client sends, and what a server may answer each with.

Owns the bytes, and never sends them: that is `http_client`'s.

Sources: RFC 9112 (message syntax, 6.3 on framing, 11.2 on smuggling), RFC 9110, RFC 3986.
"""

from __future__ import annotations

import enum
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass


class Expected(enum.Enum):
    REFUSED = "one 4xx, or none, and the connection is closed: where the next request begins is not known"
    FAULT = "one 4xx; the connection may stay"
    ANSWERED = "one answer that is no 5xx: odd, and yet a request"
    SERVED = "as many answers with 200 as requests"
    NOTHING = "the client does not wait for an answer"


@dataclass(frozen=True)
class Attack:
    """steps: bytes that are sent one after the other; None: the sending side is closed (half-close).

    num_requests: how many of them may be answered."""

    name: str
    steps: tuple[bytes | None, ...]
    expected: Expected
    num_requests: int = 1
    resets: bool = False
    """Ends with a reset instead of a close."""


def _refused(name: str, *steps: bytes | None) -> Attack:
    return Attack(name, steps, Expected.REFUSED)


def _fault(name: str, *steps: bytes | None) -> Attack:
    return Attack(name, steps, Expected.FAULT)


def _answered(name: str, *steps: bytes | None) -> Attack:
    return Attack(name, steps, Expected.ANSWERED)


def _served(name: str, *steps: bytes | None, num: int = 1) -> Attack:
    return Attack(name, steps, Expected.SERVED, num)


BODY = json.dumps({"text": "Hi", "sampling_params": {"max_new_tokens": 1, "temperature": 0}}).encode()


def head(line: bytes = b"POST /generate HTTP/1.1", *headers: bytes, host: bytes | None = b"Host: localhost") -> bytes:
    lines = [line, *([] if host is None else [host]), *headers]
    return b"\r\n".join([*lines, b"", b""])


def get(*headers: bytes, path: bytes = b"/health", **kwargs: bytes | None) -> bytes:
    return head(b"GET " + path + b" HTTP/1.1", *headers, **kwargs)


def post(body: bytes = BODY, *headers: bytes, path: bytes = b"/generate", length: int | None = None) -> bytes:
    given = b"Content-Length: %d" % (len(body) if length is None else length)
    return head(b"POST " + path + b" HTTP/1.1", b"Content-Type: application/json", given, *headers) + body


def chunked(*pieces: bytes, encoding: bytes = b"Transfer-Encoding: chunked") -> bytes:
    return head(b"POST /generate HTTP/1.1", b"Content-Type: application/json", encoding) + b"".join(pieces)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


SMUGGLED = get(path=b"/health_generate")
"""What must never be answered: it lies in another request's body, or behind its end."""


# -- the request line --------------------------------------------------------------------------------------------------
def request_lines() -> Iterator[Attack]:
    lines = {
        "no version": b"GET /health",
        "no target": b"GET HTTP/1.1",
        "nothing but a method": b"GET",
        "a colon": b":",
        "two versions": b"GET /health HTTP/1.1 HTTP/1.1",
        "two targets": b"GET /health /generate HTTP/1.1",
        "version 9.9": b"GET /health HTTP/9.9",
        "version 2.0": b"GET /health HTTP/2.0",
        "version 0.9": b"GET / HTTP/0.9",
        "version 1.10": b"GET /health HTTP/1.10",
        "version 1": b"GET /health HTTP/1",
        "version 01.1": b"GET / HTTP/01.1",
        "version -1.1": b"GET /health HTTP/-1.1",
        "version in small letters": b"GET /health http/1.1",
        "another protocol": b"GET /health HTTPS/1.1",
        "RTSP": b"DESCRIBE /health RTSP/1.0",
        "ICY": b"SOURCE / ICE/1.0",
        "a method in small letters": b"get /health HTTP/1.1",
        "an unknown method": b"FROBNICATE /health HTTP/1.1",
        "a method with a NUL": b"GE\0T /health HTTP/1.1",
        "a method with a control": b"GE\x01T /health HTTP/1.1",
        "a method of 8 bits": b"G\xc9T /health HTTP/1.1",
        "a method with a slash": b"GE/T /health HTTP/1.1",
        "a long method": b"G" * 10_000 + b" /health HTTP/1.1",
        "a space first": b" GET /health HTTP/1.1",
        "a tab first": b"\tGET /health HTTP/1.1",
        "tabs between": b"GET\t/health\tHTTP/1.1",
        "a NUL first": b"\0GET /health HTTP/1.1",
        "a form feed": b"GET /health\x0cHTTP/1.1",
        "a vertical tab": b"GET /health\x0bHTTP/1.1",
        "a NUL in the target": b"GET /hea\0lth HTTP/1.1",
        "a control in the target": b"GET /hea\x01lth HTTP/1.1",
        "DEL in the target": b"GET /hea\x7flth HTTP/1.1",
        "a carriage return in the target": b"GET /hea\rlth HTTP/1.1",
        "no slash": b"GET health HTTP/1.1",
        "a tab in the target": b"GET /hea\tlth HTTP/1.1",
        "CONNECT": b"CONNECT localhost:443 HTTP/1.1",
        "the HTTP/2 preface": b"PRI * HTTP/2.0",
        "a bad scheme": b"GET 1http://x/ HTTP/1.1",
        "a scheme alone": b"GET http: HTTP/1.1",
        "no authority": b"GET http:// HTTP/1.1",
        "a status line": b"HTTP/1.1 200 OK",
        "a header first": b"Host: localhost",
        "JSON": b'{"text": "Hi"}',
    }
    for name, line in lines.items():
        yield _refused(f"request line: {name}", head(line))
    yield _refused("request line: TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x42" * 32 + b"\r\n\r\n")
    yield _refused("request line: the PROXY protocol", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + get())
    yield _refused("request line: the PROXY protocol 2", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + b"\0" * 12 + get())
    yield _refused("request line: SSH", b"SSH-2.0-OpenSSH_9.6\r\n")
    yield _refused("request line: SMTP", b"EHLO localhost\r\nMAIL FROM: <a@b>\r\n")
    yield _refused("request line: Redis", b"*1\r\n$4\r\nPING\r\n")
    yield _refused("request line: memcached", b"stats\r\n")
    yield _refused("request line: 64 KiB of zeros", b"\0" * 65536)
    yield _refused("request line: 64 KiB of 0xff", b"\xff" * 65536)
    yield _refused("request line: 64 KiB of line ends", b"\r\n" * 32768)
    yield _refused("request line: all bytes", bytes(range(256)) * 4 + b"\r\n\r\n")


# -- targets -----------------------------------------------------------------------------------------------------------
def targets() -> Iterator[Attack]:
    bad = [
        b"/%",
        b"/%%",
        b"/%1",
        b"/%zz",
        b"/%0g",
        b"/%u0041",
        b"/%00",
        b"/health%00",
        b"/%0d%0aX:%201",
        b"/%ff%fe",
        b"/%c0%af",
        b"/%e2%28%a1",
        b"/%f8%88%80%80%80",
        b"/%ed%a0%80",
        b"/..",
        b"/../../etc/passwd",
        b"/%2e%2e/%2e%2e/x",
        b"/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        b"/..%5c..%5cx",
        b"/./health",
        b"/health/",
        b"//health",
        b"/health//",
        b"/health/../generate",
        b"/health;x=1",
        b"/HEALTH",
        b"/health%20",
        b"/health%09",
        b"/health.json",
        b"/%68ealth/x",
        b"/" + b"a" * 8000,
        b"/" + b"a/" * 4000,
        b"/" + b"%41" * 2500,
        b"/" + b"../" * 2500,
        b"/" + b"%2e%2e%2f" * 800,
        b"/[",
        b"/{",
        b"/<script>",
        b'/"',
        b"/`id`",
        b"/$(id)",
        b"/|",
        b"/^",
        b"/~root",
        b"/:80",
        b"/@x",
        b"/v1/models/%00",
        b"/v1/models/..%2f..%2fx",
        b"/v1/models/" + b"%ff" * 500,
        b"/v1//models",
        b"/v1/",
    ]
    for target in bad:
        yield _fault(f"target: {target[:40]!r}", get(path=target))
    odd = [
        b"/health?",
        b"/health??",
        b"/health?%",
        b"/health?%00",
        b"/health?a=%ff",
        b"/health?a=%zz&=&&==&b",
        b"/health?" + b"a&" * 3000,
        b"/health?" + b"a=1&" * 1500,
        b"/health?" + b"a=" + b"%41" * 2000,
        b"/health#x",
        b"/%68%65%61%6c%74%68",
        b"*",
        b"http://localhost/health",
        b"http://other.example/health",
        b"http://user:pass@localhost/health",
        b"/health?a=\xff",
        b"/get_model_info?x[]=1",
        b"/v1/models?limit=-1",
        b"/flush_cache?timeout=%00",
        b"/flush_cache?timeout=1e999",
        b"/v1/loads?include=%ff",
        b"/metrics?name[]=%00",
    ]
    for target in odd:
        yield _answered(f"target: {target[:40]!r}", get(path=target))
    yield _refused("target: 8 bits", get(path=b"/\xff"))
    yield _refused("target: UTF-8 as it is", get(path="/é龍".encode()))
    yield _refused("target: 40 KiB", get(path=b"/" + b"a" * 40_000))
    yield _refused("target: 40 KiB of query", get(path=b"/health?" + b"a=1&" * 10_000))
    yield _refused("target: no end", b"GET /" + b"a" * 100_000)


# -- headers -----------------------------------------------------------------------------------------------------------
def headers() -> Iterator[Attack]:
    lines = {
        "no colon": b"X",
        "no name": b": x",
        "a space before the colon": b"X : x",
        "a tab before the colon": b"X\t: x",
        "a space in the name": b"X Y: x",
        "a NUL in the name": b"X\0: x",
        "a NUL in the value": b"X: a\0b",
        "a control in the value": b"X: a\x01b",
        "DEL in the value": b"X: a\x7fb",
        "a bare return": b"X: a\rb",
        "a bare return at the end": b"X: a\r",
        "a folded line": b"X: a\r\n b",
        "a line folded with a tab": b"X: a\r\n\tb",
        "8 bits in the name": b"X\xe9: x",
        "a bracket in the name": b"X[: x",
        "a quote in the name": b'X": x',
        "a comma in the name": b"X,: x",
        "nothing but a space": b" ",
        "a folded first line": b" X: a",
        "a folded length": b"Content-Length:\r\n 0",
        "a folded coding": b"Transfer-Encoding:\r\n chunked",
        "a coding before a space": b"Transfer-Encoding : chunked",
        "a length before a space": b"Content-Length : 5",
        "a length before a tab": b"Content-Length\t: 5",
        "a NUL behind a length": b"Content-Length: 0\0",
        "a NUL behind a coding": b"Transfer-Encoding: chunked\0",
    }
    for name, line in lines.items():
        yield _refused(f"header, GET: {name}", get(line))
        yield _refused(f"header, POST: {name}", post(BODY, line))
    yield _answered("header: 8 bits in the value", get(b"X: a\xffb"))
    yield _answered("header: an empty value", get(b"X:"))
    yield _answered("header: a value of spaces", get(b"X:" + b" " * 1000))
    yield _answered("header: no space", get(b"X:x"))
    yield _answered("header: 100 of one name", get(*[b"X: x"] * 100))
    for name, lines_ in {
        "one of 40 KiB": [b"X: " + b"x" * 40_000],
        "one of 1 MiB": [b"X: " + b"x" * 2**20],
        "a name of 40 KiB": [b"X" * 40_000 + b": x"],
        "1,000": [b"X%d: x" % i for i in range(1000)],
        "100,000": [b"X: x"] * 100_000,
        "40 KiB in small ones": [b"X%d: %s" % (i, b"x" * 400) for i in range(100)],
        "40 KiB of cookies": [b"Cookie: " + b"a=b; " * 8000],
    }.items():
        yield _refused(f"headers: {name}", get(*lines_))
        yield _refused(f"headers, POST: {name}", post(BODY, *lines_))
    yield _refused("headers: no end", b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 200_000)
    yield _refused("headers: no end, small ones", b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: x\r\n" * 50_000)

    # who is meant
    for name, hosts in {
        "none": [],
        "two": [b"Host: a", b"Host: b"],
        "the same twice": [b"Host: localhost"] * 2,
        "two and a space": [b"Host: localhost", b"Host : b"],
    }.items():
        yield _refused(f"host: {name}", get(*hosts, host=None))
        given = b"Content-Length: %d" % len(BODY)
        yield _refused(f"host, POST: {name}", head(b"POST /generate HTTP/1.1", *hosts, given, host=None) + BODY)
    for host in (
        b"a b",
        b"a/b",
        b"a@b",
        b"a\tb",
        b"http://a",
        b"a,b",
        b"a?b",
        b"a#b",
        b"[::1",
        b"::1]",
        b"a:b:c",
        b"a:99999999",
        b"\xff",
        b"a\\b",
        b"%00",
        b"a:-1",
        b"[",
        b"a" * 5000,
    ):
        yield _answered(f"host: {host[:20]!r}", get(host=b"Host: " + host))

    # wishes
    for wish in (
        b"Expect: something-else",
        b"Expect: 100-continue, 100-continue",
        b"Expect: \xff",
        b"Expect:",
        b"TE: trailers, x",
        b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk",
        b"Upgrade:",
        b"Upgrade: \xff",
        b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHg=",
        b"Connection: close, keep-alive, \xff,,,",
        b"Connection:" + b"a," * 3000,
        b"Connection: Content-Length",
        b"Range: bytes=0-1,2-3,4-",
        b"If-None-Match: *",
        b"Accept-Encoding: gzip;q=9999",
        b"X-Forwarded-For: " + b"1.2.3.4, " * 2000,
        b"Forwarded: for=\xff",
        b"X-HTTP-Method-Override: DELETE",
        b"Origin: null",
        b"Origin: \xff",
        b"Authorization: Basic \xff",
        b"Authorization: " + b"x" * 9000,
        b"Authorization: Bearer",
        b"X-Request-Id: " + b"a" * 9000,
        b"X-Request-Id: a\tb\xffc",
        b"Cookie: a=\xff;;;=",
        b"Max-Forwards: -1",
        b"Date: yesterday",
        b"Via: " + b"1.1 a, " * 1000,
    ):
        yield _answered(f"wish: {wish[:40]!r}", get(wish))
        yield _answered(f"wish, POST: {wish[:40]!r}", post(BODY, wish))


# -- how long a body is ------------------------------------------------------------------------------------------------
def lengths() -> Iterator[Attack]:
    values = [
        b"-1",
        b"+2",
        b"0x2",
        b"1e1",
        b"2.0",
        b"2 2",
        b"2,2",
        b"2, 3",
        b"two",
        b"\xb2",
        b"2_0",
        b"",
        b" ",
        b"\t",
        b"9" * 40,
        b"18446744073709551616",
        b"18446744073709551618",
        b"4294967298x",
        b"2;x",
        b'"2"',
        b"2\x0b",
        b"\x0b2",
        b"NaN",
        b"Infinity",
        b"0b10",
        b"\xef\xbc\x92",
    ]
    for value in values:
        line = b"Content-Length: " + value
        yield _refused(f"length: {value[:24]!r}", head(b"POST /generate HTTP/1.1", line) + BODY + SMUGGLED)
        yield _refused(f"length, GET: {value[:24]!r}", get(line) + BODY + SMUGGLED)
    for value in (b"9" * 10, b"9" * 19):
        line = b"Content-Length: " + value
        yield _fault(f"length: {value!r}", head(b"POST /generate HTTP/1.1", line) + BODY)
        yield _answered(f"length, GET: {value!r}", get(line) + BODY)
    for name, lines in {
        "two that differ": [b"Content-Length: 2", b"Content-Length: 3"],
        "two that differ, in other letters": [b"content-length: 2", b"CONTENT-LENGTH: 30"],
        "and a coding": [b"Content-Length: 2", b"Transfer-Encoding: chunked"],
        "behind a coding": [b"Transfer-Encoding: chunked", b"Content-Length: 2"],
        "and two codings": [b"Content-Length: 2", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
    }.items():
        for body in (b"0\r\n\r\n", b"2\r\n{}\r\n0\r\n\r\n"):
            yield _refused(f"length: {name}, {len(body)}", head(b"POST /generate HTTP/1.1", *lines) + body + SMUGGLED)
    for value in (
        b"cow",
        b"cow, chunked",
        b"identity",
        b"identity, chunked",
        b"chunked, identity",
        b"chunked, cow",
        b"chunked, chunked",
        b"xchunked",
        b"chunkedx",
        b"chunked\x0b",
        b"\x0bchunked",
        b'"chunked"',
        b"chunked;q=1",
        b"gzip",
        b"gzip, chunked",
        b"deflate, chunked",
        b"chunk ed",
        b"",
        b",",
        b"\xffchunked",
    ):
        line = b"Transfer-Encoding: " + value
        yield _refused(f"coding: {value!r}", chunked(chunk(b"{}"), b"0\r\n\r\n", SMUGGLED, encoding=line))
    for name, lines in {
        "and another": [b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"],
        "behind another": [b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked"],
        "behind a cow": [b"Transfer-Encoding: cow", b"Transfer-Encoding: chunked"],
        "twice": [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
    }.items():
        sent = head(b"POST /generate HTTP/1.1", *lines) + chunk(b"{}") + b"0\r\n\r\n"
        yield _refused(f"coding: chunked {name}", sent + SMUGGLED)
    old = head(b"POST /generate HTTP/1.0", b"Transfer-Encoding: chunked") + chunk(b"{}") + b"0\r\n\r\n"
    yield _refused("coding: in HTTP/1.0", old + SMUGGLED)


# -- chunks ------------------------------------------------------------------------------------------------------------
def chunks() -> Iterator[Attack]:
    sizes = [
        b"g",
        b"-1",
        b"+1",
        b"0x2",
        b" 2",
        b"2 ",
        b"\t2",
        b"2\t",
        b"",
        b"F" * 17,
        b"1" + b"0" * 16,
        b"F" * 100,
        b"2_",
        b"2,",
        b"2.0",
        b"\xb2",
        b"2\0",
        b"\x002",
        b"2\x0b",
        b"2:x",
        b"2/",
        b"{}",
        b"2\r",
        b"2\r\r",
        b"ffffffffffffffff1",
    ]
    for size in sizes:
        yield _refused(f"chunk size: {size[:20]!r}", chunked(size + b"\r\n{}\r\n0\r\n\r\n", SMUGGLED))
    for name, pieces in {
        "data longer than said": [b"1\r\n{}\r\n0\r\n\r\n"],
        "data shorter than said": [b"5\r\n{}\r\n0\r\n\r\n" + b"x" * 9],
        "no line end behind data": [b"2\r\n{}0\r\n\r\n"],
        "a bare return behind data": [b"2\r\n{}\r0\r\n\r\n"],
        "a word behind data": [b"2\r\n{}x\r\n0\r\n\r\n"],
        "an empty line first": [b"\r\n2\r\n{}\r\n0\r\n\r\n"],
        "an extension without end": [b"2;" + b"x" * 10**6],
        "an extension with a NUL": [b"2;a\0b\r\n{}\r\n0\r\n\r\n"],
        "an extension with a return": [b"2;a\rb\r\n{}\r\n0\r\n\r\n"],
        "a trailer without a colon": [chunk(b"{}"), b"0\r\nX\r\n\r\n"],
        "a trailer with a NUL": [chunk(b"{}"), b"0\r\nX: \0\r\n\r\n"],
        "a folded trailer": [chunk(b"{}"), b"0\r\nX: a\r\n b\r\n\r\n"],
        "a trailer of 64 KiB": [chunk(b"{}"), b"0\r\nX: " + b"x" * 65536],
        "10,000 trailers": [chunk(b"{}"), b"0\r\n" + b"X: x\r\n" * 10_000 + b"\r\n"],
        "no size at all": [BODY + b"\r\n\r\n"],
    }.items():
        yield _refused(f"chunks: {name}", chunked(*pieces, SMUGGLED))
    for name, pieces in {
        "a trailer": [chunk(BODY), b"0\r\nX: x\r\n\r\n"],
        "one byte each": [*(chunk(BODY[i : i + 1]) for i in range(len(BODY))), b"0\r\n\r\n"],
        "an extension": [b"%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)],
        "leading zeros": [b"000%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)],
        "a coding in other letters": [],
    }.items():
        if pieces:
            yield _served(f"chunks: {name}", chunked(*pieces))
        else:
            line = b"TRANSFER-encoding: cHuNkEd"
            yield _served(f"chunks: {name}", chunked(chunk(BODY), b"0\r\n\r\n", encoding=line))
    yield _fault("chunks: a trailer that says a length", chunked(b"0\r\nContent-Length: 99\r\n\r\n"))


# -- bodies ------------------------------------------------------------------------------------------------------------
def bodies() -> Iterator[Attack]:
    bad: dict[str, bytes] = {
        "nothing": b"",
        "a space": b" ",
        "half an object": b'{"text": "Hi"',
        "half a string": b'{"text": "H',
        "null": b"null",
        "a list": b"[]",
        "a number": b"1",
        "a string": b'"Hi"',
        "true": b"true",
        "two objects": b"{}{}",
        "a word": b"Hi",
        "NaN": b'{"text": NaN}',
        "Infinity": b'{"text": "a", "sampling_params": {"temperature": Infinity}}',
        "a NUL": b"\0",
        "a NUL in a string": b'{"text": "a\0b"}',
        "a line end in a string": b'{"text": "a\nb"}',
        "bad UTF-8": b'{"text": "\xff"}',
        "an overlong NUL": b'{"text": "\xc0\x80"}',
        "a surrogate in UTF-8": b'{"text": "\xed\xa0\x80"}',
        "a lone surrogate": b'{"text": "\\ud800"}',
        "a bad escape": b'{"text": "\\x41"}',
        "a half escape": b'{"text": "\\u00"}',
        "UTF-16": '{"text": "Hi"}'.encode("utf-16"),
        "UTF-32": '{"text": "Hi"}'.encode("utf-32"),
        "a comment": b"{/**/}",
        "single quotes": b"{'text': 'Hi'}",
        "a trailing comma": b'{"text": "Hi",}',
        "no colon": b'{"text" "Hi"}',
        "100,000 brackets": b"[" * 100_000,
        "100,000 braces": b'{"a":' * 100_000,
        "a deep unknown": b'{"text":"a","x":' + b"[" * 5000 + b"]" * 5000 + b"}",
        "deep sampling_params": b'{"text":"a","sampling_params":' + b'{"a":' * 3000 + b"1" + b"}" * 3001,
        "YAML": b"text: Hi",
        "a form": b"text=Hi",
        "XML": b"<text>Hi</text>",
        "pickle": b"\x80\x04\x95\x05\0\0\0\0\0\0\0}\x94.",
        "gzip": gzip.compress(BODY),
        "a huge number": b'{"text":"a","sampling_params":{"max_new_tokens":' + b"9" * 100_000 + b"}}",
        "1e999": b'{"text":"a","sampling_params":{"temperature":1e999}}',
        "a text of a number": b'{"text": 5}',
        "ids beyond the vocabulary": b'{"input_ids": [99999999]}',
        "negative ids": b'{"input_ids": [-1]}',
        "ids of strings": b'{"input_ids": ["a"]}',
        "no prompt": b'{"sampling_params": {}}',
        "two prompts": b'{"text":"a","input_ids":[1]}',
        "an empty list": b'{"text": []}',
        "an image": b'{"text":"a","image_data":"file:///etc/passwd"}',
        "a URL": b'{"text":"a","image_data":"http://169.254.169.254/"}',
    }
    for name, body in bad.items():
        yield _fault(f"body: {name}", post(body))
    chat = b'{"model":"m","messages":%s}'
    one_chat = b'{"model":"m","messages":[{"role":"user","content":"a"}],"chat_template_kwargs":%s}'
    for name, body in {
        "messages of numbers": chat % b"[1]",
        "messages of nulls": chat % b"[null]",
        "no messages": chat % b"[]",
        "a role of a list": chat % b'[{"role":[],"content":"a"}]',
        "a content of a number": chat % b'[{"role":"user","content":1}]',
        "deep content": chat % (b'[{"role":"user","content":' + b"[" * 2000 + b"]" * 2000 + b"}]"),
        "tools that are none": b'{"model":"m","messages":[{"role":"user","content":"a"}],"tools":[1]}',
        "template arguments of a list": one_chat % b"[]",
        "deep template arguments": one_chat[:-3] + b'{"a":' + b"[" * 500 + b"]" * 500 + b"}}",
    }.items():
        yield _answered(f"chat: {name}", post(body, path=b"/v1/chat/completions"))
    for kind in (
        b"text/plain",
        b"application/x-www-form-urlencoded",
        b"multipart/form-data; boundary=x",
        b"text/plain;application/json",
        b"application/json-seq",
        b"application/jsonx",
        b"\xff",
        b"",
        b"application/json; charset=utf-16",
    ):
        sent = head(b"POST /generate HTTP/1.1", b"Content-Type: " + kind, b"Content-Length: %d" % len(BODY)) + BODY
        yield _answered(f"type: {kind!r}", sent)
    for coding in (b"gzip", b"deflate", b"br", b"zstd", b"identity, gzip", b"x", b"\xff"):
        yield _answered(f"coded as {coding!r}", post(gzip.compress(BODY), b"Content-Encoding: " + coding))
    yield _answered("coded as gzip: a bomb", post(gzip.compress(b" " * 2**24), b"Content-Encoding: gzip"))
    for method in (b"PUT", b"DELETE", b"PATCH", b"TRACE", b"OPTIONS", b"PROPFIND", b"PURGE", b"LINK"):
        for path in (b"/generate", b"/health"):
            yield _answered(f"method: {method!r} {path!r}", head(method + b" " + path + b" HTTP/1.1"))
    yield _fault("body: longer than all may be", head(b"POST /generate HTTP/1.1", b"Content-Length: 999999999") + b"{")
    yield _answered("body: with a GET", get(b"Content-Length: 2") + b"{}")
    yield _answered(
        "body: expects to go on", head(b"POST /generate HTTP/1.1", b"Content-Length: 0", b"Expect: 100-continue")
    )


# -- conduct -----------------------------------------------------------------------------------------------------------
def conduct() -> Iterator[Attack]:
    whole = post()
    cuts = [0, 1, 4, 15, 30, len(whole) - len(BODY) - 1, len(whole) - len(BODY), len(whole) - 1]
    for cut in cuts:
        yield Attack(f"leaves after {cut} bytes", (whole[:cut],), Expected.NOTHING)
        yield Attack(f"resets after {cut} bytes", (whole[:cut],), Expected.NOTHING, resets=True)
        yield _refused(f"half-closes after {cut} bytes", whole[:cut], None)
    yield Attack("leaves before the answer", (whole,), Expected.NOTHING)
    yield Attack("resets before the answer", (whole,), Expected.NOTHING, resets=True)
    yield Attack("leaves a stream", (post(BODY[:-1] + b', "stream": true}'),), Expected.NOTHING)
    yield Attack("resets eight requests", (whole * 8,), Expected.NOTHING, resets=True)
    for name, part in {
        "nothing": b"",
        "half a head": whole[:40],
        "half a body": whole[:-5],
        "half a chunk": chunked(b"5\r\n{"),
    }.items():
        yield _refused(f"sends {name} and waits", part)
    yield _served("half-closes behind a whole request", whole, None)
    yield _served("half-closes behind a GET", get(), None)
    yield _served("half-closes behind a chunked request", chunked(chunk(BODY), b"0\r\n\r\n"), None)
    yield _refused("half-closes in a chunk", chunked(b"5\r\n{"), None)
    yield _refused("half-closes before the last chunk", chunked(chunk(BODY)), None)
    yield _served("drips every byte", *(whole[i : i + 1] for i in range(len(whole))))
    yield _served("drips chunks", *(chunked(chunk(BODY), b"0\r\n\r\n")[i : i + 3] for i in range(0, 400, 3)))
    yield _served("cut between return and line feed", whole[:24], whole[24:])
    yield _served("empty lines first", b"\r\n\r\n" + get())
    for num in (2, 4, 8):
        yield _served(f"{num} requests in one piece", get() * num, num=num)
        yield _served(f"{num} requests with bodies in one piece", whole * num, num=num)
        yield _served(f"{num} requests, half-closed", get() * num, None, num=num)
    for num in (50, 1000):
        yield Attack(f"{num} requests in one piece, none read", (get() * num,), Expected.NOTHING)
    for tail in (
        b"\0",
        b"garbage\r\n\r\n",
        b"GET /\0 HTTP/1.1\r\n\r\n",
        b"{}",
        b"\xff" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
    ):
        yield Attack(f"behind a request: {tail[:20]!r}", (get() + tail,), Expected.ANSWERED, 2)
    yield Attack("a body longer than said", (post(BODY + b"xx", length=len(BODY)),), Expected.ANSWERED, 2)
    yield _refused("a body shorter than said", post(BODY, length=len(BODY) + 50), None)
    yield _served("in two pieces", whole[:60], whole[60:])


FAMILIES = (request_lines, targets, headers, lengths, chunks, bodies, conduct)
