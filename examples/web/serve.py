"""Serve the chat page and one package to this machine's browsers.

python serve.py PACKAGE [--port N]; `npm install` in this folder first.
"""

import argparse
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).parent


class Handler(SimpleHTTPRequestHandler):
    """The page's files, and under /package/ the package's."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *arguments, package: Path, **options) -> None:
        self.package = package
        super().__init__(*arguments, directory=str(PAGE), **options)

    def translate_path(self, path: str) -> str:
        """The file of an address; a folder outside of both cannot be named."""
        folder, prefix = PAGE, "/package/"
        if path.startswith(prefix):
            folder, path = self.package, path[len(prefix) - 1 :]
        self.directory = str(folder)
        return super().translate_path(path)

    def end_headers(self) -> None:
        """Without these two policies a browser gives WebAssembly no threads."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")  # a package may be exported again
        super().end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Tell of errors only."""


def main() -> int:
    """Serve until interrupted; exit status 2 where something is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="folder that phi4export wrote")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    arguments = parser.parse_args()
    for file, remedy in (
        (arguments.package / "model.onnx", "give a folder that phi4export wrote"),
        (arguments.package / "genai_config.json", "export it for a target that has one"),
        (PAGE / "node_modules/onnxruntime-web", f"run npm install in {PAGE}"),
    ):
        if not file.exists():
            print(f"{file} is missing; {remedy}", file=sys.stderr)
            return 2
    handler = partial(Handler, package=arguments.package.resolve())
    with ThreadingHTTPServer(("127.0.0.1", arguments.port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
