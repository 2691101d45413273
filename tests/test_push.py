"""Pushing to a Hub on this machine: what arrives loads from there, and what fails leaves nothing half published."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

import hfcompress
from hfcompress.checkpoint import save_compressed
from hfcompress.checkpoint.files import weights_digest
from hfcompress.errors import CheckpointError, HFCompressError
from hfcompress.publish import write_model_card
from hfcompress.publish.card import metadata
from hfcompress.publish.facts import facts_from
from hfcompress.publish.uploads import choose_files, shared_facts
from tests.conftest import tiny_llama
from tests.forks import Forks
from tests.hub_server import TOKEN
from tests.test_publish import measurements

ROOT = Path(__file__).parent.parent


class Hub:
    """A server in one process and a client of it in another."""

    def __init__(self, home: Path) -> None:
        self.errors = home / "stderr.txt"
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_server"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self.server.stdout is not None
        self.url = self.server.stdout.readline().strip()
        plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {
            **plain, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        with self.errors.open("w") as errors:
            self.client = subprocess.Popen(
                [sys.executable, "-m", "tests.hub_client"], cwd=ROOT, env=environment, text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def run(self, code: str) -> dict[str, Any]:
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        print(json.dumps(code), file=self.client.stdin, flush=True)
        found: dict[str, Any] = json.loads(self.client.stdout.readline())
        assert "crash" not in found, found
        return found

    def push(self, folder: Path, repo: str, **options: Any) -> dict[str, Any]:
        return self.run(
            "import dataclasses, hfcompress\n"
            f"result = dataclasses.asdict(hfcompress.push({str(folder)!r}, {repo!r}, **{options!r}))"
        )

    def ask(self, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data=data)) as answer:
            return json.loads(answer.read())

    def files(self, repo: str, branch: str = "main") -> list[str] | None:
        found = self.ask("/_log")["repos"].get(repo)
        return None if found is None else found["branches"].get(branch)

    def bytes_of(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        found = {}
        for name in self.files(repo, branch) or []:
            with urllib.request.urlopen(f"{self.url}/{repo}/resolve/{branch}/{name}") as answer:
                found[name] = answer.read()
        return found

    def close(self) -> None:
        for process in (self.client, self.server):
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    hub = Hub(tmp_path_factory.mktemp("home"))
    yield hub
    hub.close()
    assert TOKEN not in hub.errors.read_text()


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any, unpainted: None) -> Path:
    """A checkpoint with its card and facts, and what a training leaves beside them."""
    folder = tmp_path / "small"
    save_compressed(tiny_llama(), folder, tokenizer)
    values = measurements()
    values["recipe"] |= {"output": str(folder), "data": {"files": ["/home/somebody/reviews.tsv"]}}
    values["data"] = values["recipe"]["data"]
    values["stages"][2]["summary"] = "teacher /home/somebody/teacher, 400 steps"
    values["inputs"]["teacher of stage distill"] = "/home/somebody/teacher@main"
    (folder / "measurements.json").write_text(json.dumps(values))
    (folder / "recipe.yaml").write_text(f"name: x\noutput: {folder}\n")
    write_model_card(folder)
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "hfcompress.yaml").write_text("- dataset: {id: nyu-mll/glue, task_id: sst2}\n")
    for name in NOT_FOR_OTHERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for others")
    return folder


NOT_FOR_OTHERS = (".cache/x.json", ".env", "backup.py", "checkpoint-4/model.safetensors", "credentials.json",
                  "notes.md", "notes.txt", "optimizer.pt", "train_results.json", "training_args.bin")  # fmt: skip
EXPECTED = [".eval_results/hfcompress.yaml", "README.md", "config.json", "generation_config.json", "hfcompress.json",
            "layers.png", "measurements.json", "model.safetensors", "recipe.yaml", "size_against_quality.png",
            "tokenizer.json", "tokenizer_config.json"]  # fmt: skip


def test_push_pull_and_push_again(hub: Hub, folder: Path) -> None:
    first = hub.push(folder, "tester/small", private=True)["result"]
    assert first["changed"]
    assert first["url"] == f"{hub.url}/tester/small"
    assert hub.files("tester/small") == EXPECTED
    assert tuple(first["left_out"]) == NOT_FOR_OTHERS
    assert hub.ask("/_log")["repos"]["tester/small"]["private"] is True
    pulled = hub.run(
        "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from safetensors.torch import load_file\n"
        "model = AutoModelForCausalLM.from_pretrained('tester/small')\n"
        "AutoTokenizer.from_pretrained('tester/small')\n"
        f"saved = load_file({str(folder / 'model.safetensors')!r})\n"
        "result = all(torch.equal(model.state_dict()[name], value) for name, value in saved.items())"
    )
    assert pulled["result"] is True
    again = hub.push(folder, "tester/small")["result"]
    assert not again["changed"]
    assert again["commit"] == first["commit"]
    assert len(hub.ask("/_log")["repos"]["tester/small"]["commits"]) == 1


def test_what_arrives_names_no_paths_and_loads_from_the_repository(hub: Hub, folder: Path) -> None:
    hub.push(folder, "tester/clean")
    for name in ("README.md", "measurements.json", "recipe.yaml"):
        with urllib.request.urlopen(f"{hub.url}/tester/clean/resolve/main/{name}") as answer:
            text = answer.read().decode()
        assert "/home/somebody" not in text
        assert str(folder) not in text
        if name == "README.md":
            assert 'from_pretrained("tester/clean")' in text
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMy own words.\n")
    hub.push(folder, "tester/clean")
    with urllib.request.urlopen(f"{hub.url}/tester/clean/resolve/main/README.md") as answer:
        assert answer.read().decode() == (folder / "README.md").read_text()  # an edited card stays as it is


def test_a_card_that_names_another_repository_is_no_edited_one(hub: Hub, folder: Path) -> None:
    write_model_card(folder, "tester/old-name")
    hub.push(folder, "tester/new-name")
    card = hub.bytes_of("tester/new-name")["README.md"].decode()
    assert 'from_pretrained("tester/new-name")' in card
    assert "old-name" not in card


def test_an_edited_card_with_a_string_of_its_own_is_pushed_as_it_is(hub: Hub, folder: Path) -> None:
    card = folder / "README.md"
    card.write_text(card.read_text().replace("from_pretrained(", 'from_pretrained("C:\\models")  # or (', 1))
    hub.push(folder, "tester/windows")
    assert hub.bytes_of("tester/windows")["README.md"].decode() == card.read_text()


def test_what_an_earlier_push_told_of_another_model_does_not_stay(hub: Hub, folder: Path) -> None:
    hub.push(folder, "tester/second")
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    for name in EXPECTED:
        if name not in ("README.md", "config.json", "model.safetensors"):
            (other / name).unlink()
    (other / "README.md").write_text("---\nlibrary_name: transformers\ntags: [mine]\n---\n# Another\n")
    hub.push(other, "tester/second")
    stay = {"generation_config.json", "hfcompress.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(hub.files("tester/second") or []) == {"README.md", "config.json", "model.safetensors", *stay}


def test_weights_of_an_earlier_push_do_not_stay(hub: Hub, folder: Path, tokenizer: Any) -> None:
    hub.push(folder, "tester/shards")
    shards = folder.parent / "sharded"
    tiny_llama().save_pretrained(shards, max_shard_size="50KB")
    tokenizer.save_pretrained(shards)
    shutil.copy(folder / "README.md", shards)
    names = {path.name for path in shards.glob("model-*.safetensors")}
    assert len(names) > 1
    hub.push(shards, "tester/shards")
    there = {name for name in hub.files("tester/shards") or [] if name.startswith("model")}
    assert there == {*names, "model.safetensors.index.json"}


def test_a_branch_and_a_pull_request(hub: Hub, folder: Path) -> None:
    hub.push(folder, "tester/other")
    (folder / "recipe.yaml").write_text("name: changed\n")
    branch = hub.push(folder, "tester/other", revision="v2")["result"]
    assert branch["url"].endswith("/tester/other/tree/v2")
    assert hub.files("tester/other", "v2") == EXPECTED
    (folder / "recipe.yaml").write_text("name: proposed\n")
    before = hub.bytes_of("tester/other")
    pull = hub.push(folder, "tester/other", create_pr=True)["result"]
    assert pull["url"].endswith("/tester/other/discussions/1")
    assert len(hub.ask("/_log")["repos"]["tester/other"]["commits"]) == 3
    assert hub.bytes_of("tester/other") == before
    assert before["recipe.yaml"] != (folder / "recipe.yaml").read_bytes()


FAULTS: dict[str, tuple[list[list[Any]], str]] = {
    "400": ([["/commit/", 400, 1]], "The Hub refuses what was sent to tester/faults-400; nothing was published"),
    "401": ([["/commit/", 401, 1]], "The Hub does not know you, .* `hf auth login`"),
    "403": ([["/commit/", 403, 1]], "You may not write to tester/faults-403"),
    "409": ([["/commit/", 409, 1]], "Somebody else changed tester/faults-409 at the same time"),
    "412": ([["/commit/", 412, 1]], "Somebody else changed tester/faults-412 at the same time"),
    "500-card": ([["/validate-yaml", 500, 99]], r"The Hub failed \(status 500\)"),
    "500": ([["PUT /_lfs/", 500, 99]], r"The Hub failed \(status 500\)"),
    "500-commit": ([["/commit/", 500, 99]], r"The Hub failed \(status 500\)"),
    "dropped": ([["PUT /_lfs/", "drop", 99]], "The connection to the Hub broke"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_fails_says_what_to_do_and_publishes_nothing(name: str, hub: Hub, folder: Path) -> None:
    faults, message = FAULTS[name]
    repo = f"tester/faults-{name}"
    seed = 100 + list(FAULTS).index(name)  # weights that the store has not seen
    save_compressed(tiny_llama(seed=seed), folder.parent / "another")
    shutil.copy(folder.parent / "another" / "model.safetensors", folder)
    hub.ask("/_faults", faults)
    failed = hub.push(folder, repo)
    hub.ask("/_faults", [])
    assert failed.get("error"), failed
    assert re.search(message, failed["error"]), failed
    assert TOKEN not in failed["error"]
    assert hub.files(repo) in (None, [])
    if name in ("500", "500-card", "500-commit", "dropped"):
        assert "Run the same command again" in failed["error"]
    if name in ("400", "500", "500-commit", "dropped"):
        assert hub.files(repo) == []
        assert "an empty repository may have been made" in failed["error"]
    assert hub.push(folder, repo)["result"]["changed"]
    assert hub.files(repo) == EXPECTED


def test_a_second_attempt_sends_no_weights_twice(hub: Hub, folder: Path) -> None:
    save_compressed(tiny_llama(seed=77), folder.parent / "another")
    shutil.copy(folder.parent / "another" / "model.safetensors", folder)
    hub.ask("/_faults", [["/commit/", 500, 99]])
    assert "error" in hub.push(folder, "tester/resumed")
    hub.ask("/_faults", [])
    before = sum(line.startswith("PUT /_lfs/") for line in hub.ask("/_log")["log"])
    assert hub.push(folder, "tester/resumed")["result"]["changed"]
    assert sum(line.startswith("PUT /_lfs/") for line in hub.ask("/_log")["log"]) == before


def test_a_second_attempt_sends_the_one_shard_that_is_missing(hub: Hub, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_llama(seed=78).save_pretrained(folder, max_shard_size="50KB")
    shards = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 2
    missing = sorted(shards)[1]
    hub.ask("/_faults", [[f"PUT /_lfs/{missing}", "drop", 99]])
    assert "The connection to the Hub broke" in hub.push(folder, "tester/shard")["error"]
    hub.ask("/_faults", [])
    before = len(hub.ask("/_log")["log"])
    assert hub.push(folder, "tester/shard")["result"]["changed"]
    sent = [line for line in hub.ask("/_log")["log"][before:] if line.startswith("PUT /_lfs/")]
    assert sent == [f"PUT /_lfs/{missing}"]


def test_a_commit_of_somebody_else_in_between_stops_the_push(hub: Hub, folder: Path) -> None:
    hub.push(folder, "tester/between")
    (folder / "recipe.yaml").write_text("name: changed\n")
    before = hub.bytes_of("tester/between")
    hub.ask("/_faults", [["/preupload/", "someone commits", 1]])
    failed = hub.push(folder, "tester/between")
    hub.ask("/_faults", [])
    assert "Somebody else changed tester/between at the same time" in failed.get("error", "")
    assert hub.bytes_of("tester/between") == {**before, "theirs.txt": b"between"}


@pytest.mark.parametrize("fault", [["PUT /_lfs/", "drop", 99], ["/commit/", 500, 99]])
def test_an_update_that_fails_leaves_the_earlier_version_whole(hub: Hub, folder: Path, fault: list[Any]) -> None:
    repo = f"tester/update-{fault[1]}"
    hub.push(folder, repo)
    before = hub.bytes_of(repo)
    save_compressed(tiny_llama(seed=200 + len(repo)), folder.parent / "newer")
    shutil.copy(folder.parent / "newer" / "model.safetensors", folder)
    (folder / "recipe.yaml").write_text("name: newer\n")
    hub.ask("/_faults", [fault])
    assert "error" in hub.push(folder, repo)
    hub.ask("/_faults", [])
    assert hub.bytes_of(repo) == before
    assert hub.push(folder, repo)["result"]["changed"]
    assert hub.bytes_of(repo)["model.safetensors"] == (folder / "model.safetensors").read_bytes() != before


def test_a_commit_whose_answer_is_lost_is_found_by_the_next_push(hub: Hub, folder: Path) -> None:
    hub.ask("/_faults", [["/commit/", "drop answer", 1]])
    failed = hub.push(folder, "tester/unheard")
    assert "The connection to the Hub broke" in failed["error"]
    assert "either all of it is there or nothing" in failed["error"]
    again = hub.push(folder, "tester/unheard")["result"]
    assert not again["changed"]
    assert len(hub.ask("/_log")["repos"]["tester/unheard"]["commits"]) == 1


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, folder: Path) -> None:
    hub.push(folder, "tester/public")
    assert "exists and is public" in hub.push(folder, "tester/public", private=True)["error"]


def test_a_wrong_token_is_refused_and_not_shown(hub: Hub, folder: Path) -> None:
    other = "hf_" + "wrong" * 8
    failed = hub.push(folder, "tester/nothing", token=other)
    assert "`hf auth login`" in failed["error"]
    assert other not in failed["error"]
    hub.ask("/_faults", [["/repos/create", 400, 1]])  # whose message repeats the header with the token
    failed = hub.push(folder, "tester/nothing", token="an-older-kind-of-token")
    hub.ask("/_faults", [])
    assert "an-older-kind-of-token" not in failed["error"]
    assert hub.files("tester/nothing") is None


@pytest.mark.parametrize("kind", ["RuntimeError", "ValueError"])
def test_errors_of_the_upload_through_xet_are_explained_and_show_no_token(kind: str, hub: Hub, folder: Path) -> None:
    """They are of no kind of the Hub's client, and hold what the server said."""
    failed = hub.run(
        "import hfcompress\n"
        "from unittest.mock import patch\n"
        f"with patch('huggingface_hub.HfApi.create_commit', side_effect={kind}('CAS answered 500 to {TOKEN}')):\n"
        f"    hfcompress.push({str(folder)!r}, 'tester/xet-{kind}')"
    )
    assert TOKEN not in failed["error"]
    assert f"Pushing to tester/xet-{kind} failed: {kind}: CAS answered 500 to ***" in failed["error"]
    assert "Run the same command again" in failed["error"]
    assert hub.push(folder, f"tester/xet-{kind}")["result"]["changed"]


def test_the_command_pushes_and_says_where(hub: Hub, folder: Path) -> None:
    found = hub.run(
        "import typer.testing, hfcompress.cli as cli\n"
        f"run = typer.testing.CliRunner().invoke(cli.app, ['push', {str(folder)!r}, 'tester/command'])\n"
        "result = [run.exit_code, run.output]"
    )
    assert found["result"][0] == 0, found
    assert f"{hub.url}/tester/command" in found["result"][1]
    assert "optimizer.pt" in found["result"][1]  # what was left out is said
    assert hub.files("tester/command") == EXPECTED


def test_the_commands_options_arrive(hub: Hub, folder: Path) -> None:
    def command(*words: str) -> str:
        found = hub.run(
            "import typer.testing, hfcompress.cli as cli\n"
            f"words = ['push', {str(folder)!r}, 'tester/options', *{words!r}]\n"
            "run = typer.testing.CliRunner().invoke(cli.app, words)\n"
            "result = [run.exit_code, run.output]"
        )["result"]
        assert found[0] == 0, found
        return str(found[1])

    command("--private")
    assert hub.ask("/_log")["repos"]["tester/options"]["private"] is True
    (folder / "recipe.yaml").write_text("name: changed\n")
    assert f"{hub.url}/tester/options/tree/v2" in command("--revision", "v2")
    assert b"changed" in hub.bytes_of("tester/options", "v2")["recipe.yaml"]
    assert f"{hub.url}/tester/options/discussions/1" in command("--create-pr")
    assert b"changed" not in hub.bytes_of("tester/options")["recipe.yaml"]


def test_offline_the_command_says_what_to_do(folder: Path, forks: Forks) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    run = forks.hfcompress("push", folder, "me/x")
    assert run.returncode == 1
    assert run.stderr.endswith(
        "hfcompress: HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it and run this again.\n"
    )
    assert "Traceback" not in run.stderr


def test_code_goes_up_only_where_a_config_names_it(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_own.Own", "AutoConfig": "else/where--configuration.C"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text("from .parts import Part\n")
    (folder / "parts.py").write_text("Part = object\n")
    (folder / "spiece.model").write_bytes(b"pieces")
    upload = choose_files(folder, "me/x")
    assert {"modeling_own.py", "parts.py", "spiece.model"} <= set(upload.files)
    assert "backup.py" in upload.left_out


def test_what_is_uploaded_names_every_teacher_and_no_path() -> None:
    values = measurements()
    values["training"] = {"options": {"teacher": "/home/a, /home/b", "max_steps": "4"}, "evaluated": "at step 4 of 4"}
    values["stages"][2]["summary"] = "teacher /home/a and C:\\models\\b, 400 steps"
    values["inputs"]["teacher of stage distill"] = "/home/a@main /home/b@main"
    found = shared_facts(values)
    assert found["training"] == {"options": {"teacher": "a, b", "max_steps": "4"}, "evaluated": "at step 4 of 4"}
    assert found["stages"][2]["summary"] == "teacher a and b, 400 steps"
    assert found["inputs"] == {**measurements()["inputs"], "teacher of stage distill": "a@main b@main"}
    local = metadata(facts_from(shared_facts({**values, "base_model": "/home/a/bert", "local": ["/home/a/bert"]})))
    assert local.base_model is None  # and not `bert`, which is an id on the Hub
    kept = {"stages": values["stages"][:2], "layers": values.get("layers")}
    assert {"stages": found["stages"][:2], "layers": found.get("layers")} == kept


def test_a_folder_says_nothing_of_its_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(HFCompressError, match="Name the repository to push to"):
        hfcompress.push(folder)


def test_offline_is_one_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as the environment variable does
    with pytest.raises(HFCompressError, match="HF_HUB_OFFLINE is set, so nothing can be pushed"):
        hfcompress.push(folder, "me/x")


def test_tokens_in_files_are_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"token": TOKEN}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json holds what looks like .* access token"):
        choose_files(folder, "me/x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no README.md"),
        ("---\ntags: [a\n---\n# x", "cannot be read"),
        ("# no head", "lacks library_name"),
        (
            "---\nlibrary_name: transformers\ntags: [x]\nlicense: no-such-licence\n---\n# x",
            'does not take the metadata at the top of README.md: "license" must be one of [apache-2.0, mit]',
        ),
    ],
)
def test_a_card_that_the_hub_would_not_take_is_refused(hub: Hub, folder: Path, text: Any, message: str) -> None:
    (folder / "README.md").unlink()
    if text is not None:
        (folder / "README.md").write_text(text)
    assert message in hub.push(folder, "tester/cardless")["error"]
    assert hub.files("tester/cardless") is None


def test_a_card_of_other_weights_is_not_published(hub: Hub, folder: Path) -> None:
    """Such as of a model that was trained on and saved where it had been measured."""
    values = json.loads((folder / "measurements.json").read_text()) | {"weights": weights_digest(folder)}
    (folder / "measurements.json").write_text(json.dumps(values))
    assert hub.push(folder, "tester/measured")["result"]["changed"]
    before = hub.bytes_of("tester/measured")
    tiny_llama(seed=5).save_pretrained(folder)
    assert "not those that its card and measurements.json tell of" in hub.push(folder, "tester/measured")["error"]
    assert hub.bytes_of("tester/measured") == before


def test_a_damaged_checkpoint_is_refused(hub: Hub, folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-4])
    assert "model.safetensors is damaged" in hub.push(folder, "tester/damaged")["error"]
    assert hub.files("tester/damaged") is None


RUN_AND_PUSH = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(FOLDER)
with torch.no_grad():
    model(torch.arange(6, 14).unsqueeze(0))
model.push_to_hub("tester/run")
"""


@pytest.mark.usefixtures("few_tokens_are_fine")
@pytest.mark.parametrize("columns", [128, 80], ids=["one scheme", "two schemes"])
def test_a_packed_model_that_was_run_is_pushed_packed(columns: int, hub: Hub, tmp_path: Path) -> None:
    """Stock Transformers would push its unpacked weights; two group sizes are unpacked at the first call."""
    model = tiny_llama(intermediate_size=columns)
    hfcompress.quantize(model, hfcompress.RTN(bits=4, group_size=32))
    save_compressed(model, tmp_path / "packed")
    hub.run(RUN_AND_PUSH.replace("FOLDER", repr(str(tmp_path / "packed"))))
    found = {}
    for name in ("config.json", "model.safetensors"):
        with urllib.request.urlopen(f"{hub.url}/tester/run/resolve/main/{name}") as answer:
            found[name] = answer.read()
    before, after = (load((tmp_path / "packed" / "model.safetensors").read_bytes()), load(found["model.safetensors"]))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads(one) for one in ((tmp_path / "packed" / "config.json").read_bytes(), found["config.json"])]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


TRAIN = """
import sys
sys.argv = ["x"]
import hfcompress
from transformers import AutoModelForCausalLM, AutoTokenizer
from tests.conftest import token_batches
rows = [{k: v[0] for k, v in b.items()} for b in token_batches(8, rows=1)]
student, teacher = (AutoModelForCausalLM.from_pretrained(FOLDER) for _ in range(2))
args = hfcompress.DistillationConfig(
    output_dir=FOLDER + "-out", use_cpu=True, max_steps=4, disable_tqdm=True, save_steps=2, push_to_hub=True,
    hub_model_id="tester/pushed", hub_strategy="every_save",
)
trainer = hfcompress.DistillationTrainer(
    model=student, teacher_model=teacher, args=args, train_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(FOLDER), callbacks=[hfcompress.PruneCallback(sparsity=0.5)],
)
trainer.train()
trainer.push_to_hub(tags=["mine"])
args.hub_model_id, args.hub_private_repo = None, True
unnamed = hfcompress.push(trainer).url
args.hub_token = "hf_of_somebody_else"
try:
    refused = hfcompress.push(trainer).url
except hfcompress.HFCompressError as error:
    refused = str(error)
args.hub_token = None
args.hub_model_id = "tester/trainer"
result = [unnamed, refused[:28], hfcompress.push(trainer).changed]
"""


def test_a_trainers_own_ways_to_the_hub_keep_working(hub: Hub, folder: Path) -> None:
    """push_to_hub of the arguments, and of the Trainer, go through our card; push takes the Trainer itself."""
    found = hub.run(f"FOLDER = {str(folder)!r}\n{TRAIN}")
    assert found["result"] == [f"{hub.url}/tester/{folder.name}-out", "The Hub does not know you, o", True], found
    made = hub.ask("/_log")["repos"]
    assert made[f"tester/{folder.name}-out"]["private"] is True
    assert made["tester/pushed"]["private"] is not True
    names = hub.files("tester/pushed") or []
    assert {"README.md", "measurements.json", "model.safetensors", "tokenizer.json"} <= set(names)
    with urllib.request.urlopen(f"{hub.url}/tester/pushed/resolve/main/README.md") as answer:
        card = answer.read().decode()
    assert all(f"- {tag}\n" in card for tag in ("hfcompress", "pruned", "distilled", "mine"))
    assert 'from_pretrained("tester/pushed")' in card
    there = hub.files("tester/trainer") or []
    assert {"README.md", "measurements.json", "model.safetensors", "tokenizer.json"} <= set(there)
    assert not {"training_args.bin", "optimizer.pt"} & set(there)


STRATEGY = """
import hfcompress
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from tests.conftest import token_batches

class CardTrainer(hfcompress.ModelCardMixin, Trainer):
    pass

rows = [{k: v[0] for k, v in b.items()} for b in token_batches(8, rows=1)]
distils = KIND is hfcompress.DistillationTrainer
args = (hfcompress.DistillationConfig if distils else TrainingArguments)(
    output_dir=OUT, use_cpu=True, max_steps=4, disable_tqdm=True, save_steps=2, push_to_hub=True,
    hub_model_id=REPO, hub_strategy=NAME, hub_always_push=True, report_to="none",
)
trainer = KIND(
    model=AutoModelForCausalLM.from_pretrained(FOLDER), args=args, train_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(FOLDER),
    callbacks=[hfcompress.PruneCallback(sparsity=0.5, end=0.75)],
    **({"teacher_model": AutoModelForCausalLM.from_pretrained(FOLDER)} if distils else {}),
)
trainer.train()
trainer.push_to_hub(dataset="me/rows", license="mit")
model = AutoModelForCausalLM.from_pretrained(REPO)
result = hfcompress.PruneCallback(sparsity=0.5).reached(model)
"""
CHECKPOINTS = {"end": (), "every_save": (), "checkpoint": ("last-checkpoint",),
               "all_checkpoints": ("checkpoint-2", "checkpoint-4")}  # fmt: skip


DISTILLS = "hfcompress.DistillationTrainer"
WAYS = [*((kind, name) for kind in ("Trainer", DISTILLS) for name in CHECKPOINTS), ("CardTrainer", "every_save")]


@pytest.mark.parametrize(("kind", "strategy"), WAYS)
def test_every_hub_strategy_works_with_our_callbacks(kind: str, strategy: str, hub: Hub, folder: Path) -> None:
    """What from_pretrained then gets from the Hub is pruned; the card is ours, or the Trainer's own with our tags."""
    repo = f"tester/{kind}-{strategy}".lower()
    code = STRATEGY.replace("KIND", kind).replace("NAME", repr(strategy)).replace("REPO", repr(repo))
    found = hub.run(code.replace("FOLDER", repr(str(folder))).replace("OUT", repr(str(folder.parent / strategy))))
    assert found["result"] == pytest.approx(0.5, abs=0.01), found
    names = hub.files(repo) or []
    folders = {name.split("/")[0] for name in names if name.endswith("/optimizer.pt")}
    assert folders == set(CHECKPOINTS[strategy])
    with urllib.request.urlopen(f"{hub.url}/{repo}/resolve/main/README.md") as answer:
        card = answer.read().decode()
    assert all(f"- {tag}\n" in card for tag in ("hfcompress", "pruned"))
    assert ("- distilled\n" in card) is (kind == DISTILLS)
    assert "license: mit" in card
    assert "me/rows" in card
    assert ("measurements.json" in names) is (kind != "Trainer")
    assert ("Loads without hfcompress" in card) is (kind != "Trainer")
