"""A bucket of Google Cloud Storage on this machine: as much of its JSON API as gcsfs and TensorStore ask for.

    with bucket.serve() as environment: …    environment variables that send both of them there, for `gs://any/path`

Objects are whole and have a generation; nothing can be appended to one.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import google_crc32c


class Store:
    """The objects, by bucket and name."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.writes: dict[str, int] = {}  # of each object
        self.generation = 0
        self.lock = threading.Lock()

    def put(self, bucket: str, name: str, data: bytes) -> dict[str, Any]:
        self.generation += 1
        self.objects[bucket, name] = data, self.generation
        self.writes[name] = self.writes.get(name, 0) + 1
        return self.resource(bucket, name)

    def resource(self, bucket: str, name: str) -> dict[str, Any]:
        data, generation = self.objects[bucket, name]
        return {
            'kind': 'storage#object', 'bucket': bucket, 'name': name, 'size': str(len(data)),
            'generation': str(generation), 'metageneration': '1', 'contentType': 'application/octet-stream',
            'timeCreated': '2026-01-01T00:00:00Z', 'updated': '2026-01-01T00:00:00Z', 'storageClass': 'STANDARD',
            'md5Hash': base64.b64encode(hashlib.md5(data).digest()).decode(),
            'crc32c': base64.b64encode(google_crc32c.Checksum(data).digest()).decode(),
        }  # fmt: skip

    def listing(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
        start, end = query.get('startOffset', ''), query.get('endOffset')
        names, prefixes = [], set()
        for _, name in sorted(key for key in self.objects if key[0] == bucket):
            if not name.startswith(prefix) or name < start or end and name >= end:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ('', '', '')
            prefixes.add(prefix + head + found) if found else names.append(name)
        items = [self.resource(bucket, name) for name in names]
        return {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes)}


def _handler(store: Store) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self, status: int, body: Any = None, **headers: str) -> None:
            data = body if isinstance(body, bytes) else b'' if body is None else json.dumps(body).encode()
            self.send_response(status)
            kind = 'application/octet-stream' if isinstance(body, bytes) else 'application/json'
            for name, value in {'Content-Type': kind, 'Content-Length': str(len(data)), **headers}.items():
                self.send_header(name.replace('_', '-'), value)
            self.end_headers()
            if self.command != 'HEAD':
                self.wfile.write(data)

        def handle_one(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
            with store.lock:
                self.route(re.sub('^/+', '/', url.path), query, body)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_one

        def route(self, path: str, query: dict[str, str], body: bytes) -> None:
            if path.startswith('/upload/'):
                return self.upload(path, query, body)
            if copy := re.fullmatch(r'/storage/v1/b/([^/]+)/o/(.+)/rewriteTo/b/([^/]+)/o/(.+)', path):
                bucket, name, to, target = map(urllib.parse.unquote, copy.groups())
                if (bucket, name) not in store.objects:
                    return self.answer(404, {'error': {'code': 404, 'message': 'Not Found'}})
                resource = store.put(to, target, store.objects[bucket, name][0])
                size = resource['size']
                return self.answer(
                    200, {'done': True, 'resource': resource, 'objectSize': size, 'totalBytesRewritten': size}
                )
            if move := re.fullmatch(r'/storage/v1/b/([^/]+)/o/(.+)/moveTo/o/(.+)', path):
                bucket, name, target = map(urllib.parse.unquote, move.groups())
                if (bucket, name) not in store.objects:
                    return self.answer(404, {'error': {'code': 404, 'message': 'Not Found'}})
                resource = store.put(bucket, target, store.objects[bucket, name][0])
                if name != target:
                    del store.objects[bucket, name]
                return self.answer(200, resource)
            if found := re.fullmatch(r'(?:/download)?/storage/v1/b/([^/]+)/o/(.+)', path):
                return self.object(*map(urllib.parse.unquote, found.groups()), query)
            if found := re.fullmatch(r'/storage/v1/b/([^/]+)/o/?', path):
                return self.answer(200, store.listing(found[1], query))
            if found := re.fullmatch(r'/storage/v1/b/([^/]+)/?', path):
                return self.answer(200, {'kind': 'storage#bucket', 'name': found[1], 'storageClass': 'STANDARD'})
            self.answer(404, {'error': {'code': 404, 'message': f'no such route {self.command} {path}'}})

        def object(self, bucket: str, name: str, query: dict[str, str]) -> None:
            if (bucket, name) not in store.objects:
                return self.answer(404, {'error': {'code': 404, 'message': 'Not Found'}})
            data, generation = store.objects[bucket, name]
            if self.command == 'DELETE':
                if query.get('ifGenerationMatch', str(generation)) != str(generation):
                    return self.answer(412)
                del store.objects[bucket, name]
                return self.answer(204)
            if query.get('alt') != 'media':
                return self.answer(200, store.resource(bucket, name))
            if query.get('ifGenerationNotMatch') == str(generation):
                return self.answer(304)
            about = {'x-goog-generation': str(generation), 'x-goog-stored-content-length': str(len(data))}
            if part := re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range') or ''):
                first, last = part.groups()
                start = int(first) if first else max(0, len(data) - int(last))
                end = min(int(last) + 1, len(data)) if first and last else len(data)
                if start >= len(data):
                    return self.answer(416, **about)
                return self.answer(
                    206, data[start:end], **about, **{'Content-Range': f'bytes {start}-{end - 1}/{len(data)}'}
                )
            self.answer(200, data, **about)

        def upload(self, path: str, query: dict[str, str], body: bytes) -> None:
            bucket = urllib.parse.unquote(path.split('/b/')[1].split('/')[0])
            if 'upload_id' in query:
                return self.more(query['upload_id'], body)
            kind = query.get('uploadType')
            if kind == 'resumable':
                key = str(len(store.uploads))
                name = query.get('name') or json.loads(body)['name']
                store.uploads[key] = bucket, name, bytearray()
                host = self.headers['Host']
                return self.answer(200, Location=f'http://{host}{path}?uploadType=resumable&upload_id={key}')
            if kind == 'multipart':
                boundary = re.search(r'boundary="?([^";]+)', self.headers['Content-Type'])
                assert boundary is not None
                _, about, content, _ = body.split(b'--' + boundary[1].strip("'").encode())
                name = json.loads(about.partition(b'\n\n' if b'\r\n\r\n' not in about else b'\r\n\r\n')[2])['name']
                gap = b'\r\n\r\n' if b'\r\n\r\n' in content else b'\n\n'
                content = content.partition(gap)[2]
                content = content[: -len(b'\r\n')] if content.endswith(b'\r\n') else content[: -len(b'\n')]
                return self.answer(200, store.put(bucket, name, content))
            name = query['name']
            here = store.objects.get((bucket, name), (b'', 0))[1]
            if query.get('ifGenerationMatch', str(here)) != str(here):
                return self.answer(412)
            self.answer(200, store.put(bucket, name, body))

        def more(self, key: str, body: bytes) -> None:
            bucket, name, data = store.uploads[key]
            data += body
            total = (self.headers.get('Content-Range') or 'bytes */*').rpartition('/')[2]
            if total == '*' or len(data) < int(total):
                return self.answer(308, **({'Range': f'bytes=0-{len(data) - 1}'} if data else {}))
            self.answer(200, store.put(bucket, name, bytes(data)))

    return Handler


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who was killed reads no answer."""


@contextlib.contextmanager
def serve() -> Iterator[tuple[Store, dict[str, str]]]:
    """(the objects, the environment in which gs:// is here)."""
    store = Store()
    server = _Server(('127.0.0.1', 0), _handler(store))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = f'http://127.0.0.1:{server.server_port}'
    try:
        yield store, {
            'STORAGE_EMULATOR_HOST': where, 'TENSORSTORE_GCS_HTTP_URL': where, 'NO_GCE_CHECK': 'true',
            'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
        }  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
