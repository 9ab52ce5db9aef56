"A server that answers like the Hub, with the files of a mirror: revisions, trees, and ranges of bytes; it can be made to refuse."
import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    "`limited`: how many of the next requests for files are answered by 429; `gated`, `absent`: repositories that need a login or are gone."

    def __init__(self, mirror: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.mirror, self.limited, self.gated, self.absent, self.asked = Path(mirror), 0, set(), set(), Counter()
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status: int, content: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        file = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        repository = (api or file or [None, ""])[1]
        if repository in self.server.gated:
            return self.reply(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access to dataset is restricted")
        if not repository or repository in self.server.absent or not (self.server.mirror / repository).is_dir():
            return self.reply(404, b"{}", X_Error_Code="RepoNotFound")
        if file:
            self.file(self.server.mirror / repository / file[3])
        elif api[2] == "tree":
            self.tree(repository, api[4] or "", "recursive=true" in self.path.lower())
        elif api[2] == "paths-info":
            self.paths(repository)
        else:
            self.json({"id": repository, "sha": COMMIT, "siblings": []})

    do_HEAD = do_POST = do_GET

    def json(self, answer: object) -> None:
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

    def entry(self, root: Path, path: Path) -> dict:
        kind = {"type": "directory"} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
        return kind | {"oid": "0" * 40, "path": path.relative_to(root).as_posix()}

    def tree(self, repository: str, folder: str, recursive: bool) -> None:
        root = self.server.mirror / repository
        if not (root / folder).is_dir():
            return self.reply(404, b"{}", X_Error_Code="EntryNotFound")
        self.json([self.entry(root, path) for path in sorted((root / folder).glob("**/*" if recursive else "*"))])

    def paths(self, repository: str) -> None:
        body, root = self.rfile.read(int(self.headers["Content-Length"])), self.server.mirror / repository
        sent = json.loads(body)["paths"] if body.startswith(b"{") else [unquote(part.partition("=")[2]) for part in body.decode().split("&")
                                                                        if part.startswith("paths=")]
        self.json([self.entry(root, root / path) for path in sent if (root / path).exists()])

    def file(self, path: Path) -> None:
        if not path.is_file():
            return self.reply(404, b"{}", X_Error_Code="EntryNotFound")
        self.server.asked[path.name] += 1
        if self.server.limited:
            self.server.limited -= 1
            return self.reply(429, b"{}", Retry_After="0", RateLimit='"resolvers";r=0;t=0')
        content, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        about = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if not asked:
            return self.reply(200, content, **about)
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        self.reply(206, content[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(content)}", **about)
