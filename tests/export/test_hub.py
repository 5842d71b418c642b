"""What is pushed to the hub, seen by a server that speaks the part of its interface that a push needs."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from adapters import save_adapter
from processes import PATIENCE
from tiny import save_model

from sails_align.core.errors import InputError
from sails_align.export.card import write_card
from sails_align.export.hub import files_to_push, push

SECRET = "hf_" + "s3cr3tS3cr3t" * 3
CODE = """
import json, sys
from pathlib import Path
from sails_align.core.errors import exit_on_input_error
from sails_align.export.hub import push
folder, repo, options = sys.argv[1:]
with exit_on_input_error():
    print(push(Path(folder), repo, **json.loads(options)))
"""
PUSHED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "run.json",
    "config.yaml",
    "metrics.json",
    "subspace/subspace.json",
    "subspace/subspace.safetensors",
}
KEPT = {
    "training_args.bin",
    "responses.jsonl",
    "base.json",
    "optimizer.pt",
    "notes.txt",
    ".env",
    "checkpoint-2/adapter_model.safetensors",
    "checkpoint-2/README.md",
    "checkpoint-2/optimizer.pt",
    "subspace/notes.txt",
    "model/config.json",
}


@dataclass
class Hub:
    """A hub with nothing in it."""

    status: int = 200
    refused: str = "/"
    """Requests with this in their path are answered with the status."""
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    authorizations: set[str | None] = field(default_factory=set)
    url: str = ""

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/api/repos/create"):
            self.requests.append((path, json.loads(body)))
            name = "/".join(filter(None, (json.loads(body)["organization"] or "me", json.loads(body)["name"])))
            return {"url": f"{self.url}/{name}", "name": name}
        self.requests.append((path, {}))
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            repo = path.split("/api/models/")[1].split("/commit/")[0]
            return {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": "1" * 40, "success": True}
        return {}  # a branch is made, or the metadata of README.md are right


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.authorizations.add(self.headers["Authorization"])
            answer = state.answer(self.path, self.rfile.read(int(self.headers["Content-Length"] or 0)))
            status = state.status if state.refused in self.path else 200
            content = json.dumps(answer if status == 200 else {"error": "no", "errors": [{"message": "no"}]}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What is in a run directory, and some things that have no business there."""
    folder = tmp_path / "my run"
    save_model(tmp_path / "tiny")
    save_adapter(folder, tmp_path / "tiny")
    for name in (PUSHED | KEPT) - {"adapter_model.safetensors", "adapter_config.json"}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    for name in ("run.json", "subspace/subspace.json"):
        (folder / name).unlink()
    write_card(folder, folder)
    for name in ("run.json", "subspace/subspace.json"):
        (folder / name).write_text("{}")
    return folder


def start(
    folder: Path, repo: str, url: str, *, offline: str = "0", debug: str = "0", **options: Any
) -> subprocess.CompletedProcess[str]:
    """A push by a process of its own, since the hub's address is read on import. Debugging prints every request."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": offline, "HF_HOME": str(folder.parent / "home"), "HF_DEBUG": debug}
    words = [sys.executable, "-c", CODE, str(folder), repo, json.dumps({"token": SECRET, **options})]
    ended = subprocess.run(words, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert SECRET not in ended.stdout + ended.stderr, "the token is in no message"
    return ended


def test_what_arrives(hub: Hub, run: Path) -> None:
    ended = start(run, "me/aligned", hub.url, debug="1", private=True, revision="v2")
    assert ended.returncode == 0, ended.stderr
    assert "authorization: <TOKEN>" in ended.stderr, "requests are printed, and the token would be"
    assert ended.stdout.strip() == f"{hub.url}/me/aligned"
    assert set(hub.files) == PUSHED
    for name, content in hub.files.items():
        assert content == (run / name).read_bytes(), name
    assert b"safety-aligned" in hub.files["README.md"], "our model card, and not TRL's"
    assert not any(SECRET.encode() in content for content in hub.files.values())
    assert hub.authorizations == {f"Bearer {SECRET}"}
    path, body = hub.requests[0]
    assert path == "/api/repos/create"
    assert body.get("visibility") == "private" or body.get("private") is True  # the latter before huggingface_hub 1.8
    paths = [path for path, _ in hub.requests[1:]]
    assert (paths[0], paths[-1]) == ("/api/models/me/aligned/branch/v2", "/api/models/me/aligned/commit/v2")
    assert set(paths[1:-1]) == {"/api/validate-yaml", "/api/models/me/aligned/preupload/v2"}


def test_a_merged_model_and_a_repository_without_user(hub: Hub, run: Path, tmp_path: Path) -> None:
    merged = tmp_path / "tiny"
    (merged / "README.md").write_text("ours")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.pt"):
        (merged / name).write_text("x")
    ended = start(merged, "aligned", hub.url)
    assert ended.stdout.strip() == f"{hub.url}/me/aligned", ended.stderr
    assert set(hub.files) == {path.name for path in merged.iterdir()} - {"pytorch_model.bin", "model.pt"}
    assert {"config.json", "model-00001-of-00002.safetensors"} < set(hub.files)
    assert hub.requests[-1][0] == "/api/models/me/aligned/commit/main"
    assert not {"visibility", "private"} & hub.requests[0][1].keys()


def test_a_hub_that_refuses(hub: Hub, run: Path) -> None:
    hub.status = 401
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    ended = start(run, "me/aligned", hub.url, private=True)
    assert ended.returncode == 2
    message = ended.stderr.partition("error: ")[2]
    assert "cannot push to me/aligned" in message
    assert "401" in message
    assert f"everything is saved in {run}" in message
    assert f"hf upload me/aligned '{run}' . --private --include README.md" in message
    assert "--include 'subspace/*'" in message
    assert "training_args" not in message
    assert len(message.strip().splitlines()) == 3
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(("refused", "status"), [("validate-yaml", 400), ("branch", 403), ("commit", 413)])
def test_a_step_that_fails(hub: Hub, run: Path, refused: str, status: int) -> None:
    hub.refused, hub.status = refused, status
    ended = start(run, "me/aligned", hub.url, revision="v2")
    assert ended.returncode == 2
    assert "cannot push to me/aligned" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not hub.files or refused == "commit"


@pytest.mark.parametrize("offline", ["0", "1"])
def test_no_connection(run: Path, offline: str) -> None:
    ended = start(run, "me/aligned", "http://127.0.0.1:9", offline=offline, revision="v2")
    assert ended.returncode == 2
    message = ended.stderr.partition("error: ")[2]
    assert "cannot push to me/aligned" in message
    assert ("offline mode" in message) == (offline == "1")
    assert "hf upload me/aligned" in message
    assert "--revision v2" in message
    assert "Traceback" not in ended.stderr


def test_the_command_for_later_takes_the_same_files(run: Path) -> None:
    """By the patterns of the hub's own client."""
    from huggingface_hub.utils import filter_repo_objects

    with pytest.raises(InputError) as caught:
        push(run, "not a name!")
    words = str(caught.value).splitlines()[2].split()
    patterns = [word.strip("'") for before, word in pairwise(words) if before == "--include"]
    names = [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()]
    assert set(filter_repo_objects(names, allow_patterns=patterns)) == PUSHED | {"subspace/notes.txt"}
    assert set(files_to_push(run)) == PUSHED


@pytest.mark.parametrize("name", ["run.json", "metrics.json", "README.md", "config.yaml"])
def test_a_token_in_a_file_is_not_pushed(run: Path, name: str) -> None:
    for secret, token in ((SECRET, None), ("my-own-token", "my-own-token")):
        (run / name).write_text(f'{{"model_init_kwargs": {{"token": "{secret}"}}}}')
        with pytest.raises(InputError, match="holds a token of the hub") as caught:
            push(run, "me/aligned", token=token)
        assert secret not in str(caught.value)


def test_nothing_to_push(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("alone")
    with pytest.raises(InputError, match="no adapter and no model"):
        push(tmp_path, "me/aligned")
