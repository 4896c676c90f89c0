"""Serve this folder to the browser of this machine, with the headers that let WebAssembly use threads.

python examples/web/serve.py
python examples/web/serve.py 8080
"""

import functools
import http.server
import sys
from pathlib import Path

PORT = 8000
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # these two isolate the page: else no shared memory, and so no threads
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Content-Security-Policy": "connect-src 'self'",  # of the worker too, which the page's own policy does not reach
    "Cache-Control": "no-cache",  # a newly exported model.onnx counts at once
}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with the headers; their types do not depend on what this machine calls them."""

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

    def log_request(self, *words: object) -> None:
        """Say nothing of what went well."""


def make_server(port: int, folder: Path = Path(__file__).parent) -> http.server.ThreadingHTTPServer:
    """Listen on this machine only; port 0: any free one."""
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
