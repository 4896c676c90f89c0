"""Serve this folder to browsers on this machine, with the headers that allow WebAssembly threads.

python examples/web/serve.py
python examples/web/serve.py 8080
"""

import functools
import http.server
import sys
from pathlib import Path
from typing import Any

PORT = 8000
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # these two isolate the page, which shared memory and so threads need
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Content-Security-Policy": "connect-src 'self'",  # also for the worker, to which the policy in the page does not apply
    "Cache-Control": "no-cache",  # a newly exported model.onnx is used at once
}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files with the headers above and fixed MIME types, independent of the machine's registry."""

    extensions_map = {  # noqa: RUF012  # as the class it extends declares it
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def send_head(self) -> Any:
        try:
            return super().send_head()
        except ValueError:  # no file has such a name: it has a zero byte, or is no valid UTF-8
            self.send_error(404, "File not found")
            return None

    def log_request(self, *words: object) -> None:
        """Do not log successful requests."""


def make_server(port: int, folder: Path = Path(__file__).parent) -> http.server.ThreadingHTTPServer:
    """Create a server that listens on this machine only; port 0: any free port."""
    handler = functools.partial(Handler, directory=str(folder))
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


def main(argv: list[str]) -> None:
    """Serve until Ctrl-C."""
    try:
        port = int(argv[0]) if argv else PORT
        server = make_server(port)
    except (ValueError, OverflowError, OSError) as error:
        sys.stderr.write(f"error: {argv[0] if argv else PORT}: {error}; expected a free port, such as 8080\n")
        sys.exit(2)
    sys.stdout.write(f"open http://127.0.0.1:{server.server_port} ; Ctrl-C ends it\n")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
