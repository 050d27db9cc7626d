"""The documents: every command that they show can be given, what they name exists, and the examples
run."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import itertools
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from omegaconf import OmegaConf
from torchtune._cli.tune import TuneCLIParser

from steerlm2._tune import RECIPES, SINGLE_PROCESS_RECIPES, recipe_directories
from steerlm2.config.loader import CONFIG_CLASS, load_config, load_recipe
from steerlm2.serving import vllm_command
from steerlm2.torchtune_private import merge_arguments

ROOT = Path(__file__).resolve().parents[2]
RECIPE_FOLDER, CONFIG_FOLDER = recipe_directories()
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("", "recipes", "recipe_configs", "steerlm2", "tests")
    for path in (ROOT / folder).glob("*.md" if not folder else "**/*.md")
)
CONFIG_NAMES = {config for configs in RECIPES.values() for config in configs}
TRAINING = ("reward_distributed", "sft_distributed", "steerlm2_distributed")
PLACEHOLDER = re.compile(r"[A-Z_]+(\.yaml)?|\$\w+")
"""A word that stands for the reader's own, such as NAME."""

PROGRAMS = {"cd", "curl", "echo", "printf", "pytest", ".", "mkdir"}
"""Whose arguments aren't checked."""


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """Fenced blocks of a language with the file that the line above them names, or ""."""
    pattern = rf"(?:^`([\w.]+)`:\n\n)?^```{language}\n(.*?)^```$"
    return re.findall(pattern, text, re.MULTILINE | re.DOTALL)


def shell_lines(block: str) -> Iterator[str]:
    """The commands of a shell block, each with its continuation lines."""
    waiting = ""
    for line in block.replace("\\\n", " ").splitlines():
        waiting += line
        try:
            shlex.split(waiting, comments=True)
        except ValueError:  # a quotation that goes on
            waiting += "\n"
            continue
        yield waiting
        waiting = ""
    assert not waiting, f"a quotation without an end: {waiting}"


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line; without those of the shell itself and redirections."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["for"] or words == ["done"]:
        return
    for is_end, command in itertools.groupby(words, lambda word: word in ("&&", "|")):
        if not is_end:
            yield list(itertools.takewhile(lambda word: word != ">", command))


def commands_in(text: str) -> list[list[str]]:
    """The commands of shell blocks, and the `tune run`s of indented lines."""
    found = [
        command
        for _, block in blocks(text, "sh")
        for line in shell_lines(block)
        for command in simple_commands(line)
    ]
    indented = re.findall(r"^    (tune run .*)$", without_blocks(text), re.MULTILINE)
    return [*found, *map(shlex.split, indented)]


def mentioned_in(text: str) -> list[list[str]]:
    """The commands of the running text."""
    mentioned = re.findall(
        r"`((?:tune run|pip install|python -m) [^`]+)`", without_blocks(text).replace("\n", " ")
    )
    return list(map(shlex.split, mentioned))


def without_blocks(text: str) -> str:
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return rest.replace("\\\n", " ")


def docstring(recipe: str) -> str:
    source = (RECIPE_FOLDER / f"{recipe}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def parameters(commands: Callable[[str], list[list[str]]]) -> list[Any]:
    """Each command once, with the text that shows it."""
    texts = {document: text_of(document) for document in DOCUMENTS}
    texts |= {f"recipes/{recipe}.py": docstring(recipe) for recipe in RECIPES}
    shown = {
        shlex.join(command): pytest.param(text, command, id=f"{name}: {shlex.join(command)[:100]}")
        for name, text in texts.items()
        for command in commands(text)
    }
    return list(shown.values())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the examples' files are, as the reader has saved them."""
    for document in DOCUMENTS:
        for language in ("python", "yaml"):
            for name, content in blocks(text_of(document), language):
                if name:
                    (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.mark.parametrize(("text", "command"), parameters(commands_in))
def test_a_command_can_be_given(
    text: str, command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `tune run` names a recipe and a config of it, and gives all keys that the config leaves
    open, right ones only; other programs are known ones, with options that they have."""
    copies = {words[3]: words[2] for words in commands_in(text) if words[:2] == ["tune", "cp"]}
    check_command(command, copies, monkeypatch)


@pytest.mark.parametrize(("text", "command"), parameters(mentioned_in))
def test_a_command_that_is_mentioned_exists(
    text: str, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `tune run` fits its config, but may leave keys open."""
    if command[0] == "tune":
        check_tune(command[1:], {}, complete=False)
    else:
        check_command(command, {}, monkeypatch)


def check_command(
    command: list[str], copies: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Args:
        copies: by file, the ready-made config that it is a copy of.
    """
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), command))
    program, arguments = words[0], words[1:]
    if program == "tune":
        check_tune(arguments, copies)
    elif program in ("python", "python3"):
        assert arguments[0] == "-m"
        module = arguments[1]
        if module == "steerlm2.serving.vllm_command":
            inner = check_vllm_command(arguments[2:], monkeypatch)
            check_command(inner, copies, monkeypatch)
        elif not module.startswith("vllm."):
            assert importlib.util.find_spec(module) is not None
    elif program == "pip":
        extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(\w+)\]", " ".join(arguments))) <= set(extras)
    elif program == "sbatch":
        assert arguments[0] == "--nodes"
        script, *recipe_arguments = arguments[2:]
        assert (ROOT / script).is_file()
        recipe = ["steerlm2_pipeline"] if "pipeline" in script else []
        check_tune(["run", *recipe, *recipe_arguments], copies)
    elif program.startswith("recipes/launch/"):
        assert (ROOT / program).is_file()
        check_tune(["run", *arguments], copies)
    else:
        assert program in PROGRAMS


def check_vllm_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options are right ones; returns the command that runs beside the server."""
    run: list[list[str]] = []
    monkeypatch.setattr(vllm_command, "vllm_command", lambda *args, **options: ["served"])
    monkeypatch.setattr(vllm_command, "check_weights", lambda checkpoint_dir: None)
    monkeypatch.setattr(
        vllm_command, "run_with_server", lambda server, inner, **options: run.append(inner) or 0
    )
    monkeypatch.setattr(sys, "argv", ["vllm_command", *arguments])
    with pytest.raises(SystemExit) as ended:
        vllm_command.main()
    assert ended.value.code == 0
    (inner,) = run
    return inner


def check_tune(arguments: list[str], copies: dict[str, str], *, complete: bool = True) -> None:
    """
    Args:
        complete: whether no key may be left open.
    """
    parser = TuneCLIParser()._parser
    given = parser.parse_args(arguments)
    if arguments[0] in ("cp", "cat"):
        assert arguments[1] in CONFIG_NAMES | RECIPES.keys() or PLACEHOLDER.fullmatch(arguments[1])
    if arguments[0] != "run" or given.recipe.endswith(".py"):
        return
    recipe, recipe_arguments = given.recipe, given.recipe_args
    if PLACEHOLDER.fullmatch(recipe):
        return
    assert recipe in RECIPES
    if "--help" in recipe_arguments or (not complete and not recipe_arguments):
        return
    assert recipe_arguments[0] == "--config"
    name, *overrides = recipe_arguments[1:]
    if PLACEHOLDER.fullmatch(name):
        return
    processes = int(given.nnodes.split(":")[-1]) * int(given.nproc_per_node)
    assert processes == 1 or recipe not in SINGLE_PROCESS_RECIPES
    config = loaded(recipe, copies.get(name, name), overrides, complete)
    if hasattr(config, "tensor_parallel_dim") and processes > 1:
        dims = config.tensor_parallel_dim * config.data_parallel_replicate_dim
        assert processes % dims == 0


def loaded(recipe: str, name: str, overrides: list[str], complete: bool) -> Any:
    """The config that the recipe's `main` gets.

    Raises:
        ValueError: where it has problems.
    """
    file = CONFIG_FOLDER / f"{name}.yaml" if not name.endswith(".yaml") else Path(name)
    if recipe == "plan_memory":
        (recipe,) = (each for each in TRAINING if name in RECIPES[each])
        own = {field.name for field in dataclasses.fields(config_class("plan_memory"))}
        overrides = [each for each in overrides if each.split("=")[0] not in own]
    elif not name.endswith(".yaml"):
        assert name in RECIPES[recipe]
    plain = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file), resolve=False))
    values = merge_arguments(plain, overrides)
    if not complete:
        for key in OmegaConf.missing_keys(values):
            OmegaConf.update(values, key, "given.jsonl")
    config = load_config(config_class(recipe), values)
    if recipe == "steerlm2_pipeline":
        load_recipe(RECIPE_FOLDER / f"{recipe}.py").PipelineRecipe(config).setup()
    return config


def config_class(recipe: str) -> Any:
    return getattr(load_recipe(RECIPE_FOLDER / f"{recipe}.py").main, CONFIG_CLASS)


def example(document: str, start: str) -> list[str]:
    """The arguments behind `tune run` of the one command that begins so."""
    (found,) = (
        command[2:]
        for command in commands_in(text_of(document))
        if shlex.join(command).startswith(f"tune run {start}")
    )
    return found


FEW_STEPS = (
    *("max_steps=2", "lr_scheduler.warmup_steps=1", "global_batch_size=2"),
    *("dataset.num_records=8", "save_every_n_steps=null"),
)
NO_VALIDATION = ("val_every_n_steps=null", "dataset_val=null", "generation=null", "export=last")
SHORT_VALIDATION = (
    *("val_every_n_steps=2", "dataset_val.num_records=2"),
    *("generation.from_dataset_val=0", "generation.max_new_tokens=4"),
)


def test_the_example_of_a_loss_trains(folder: Path, tune: Any) -> None:
    run = dataclasses.replace(tune, cwd=folder)
    arguments = example("steerlm2/README.md", "steerlm2_distributed")
    run(*arguments, *FEW_STEPS, *NO_VALIDATION)
    first, *_ = (folder / "my_loss_run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first)["loss"] > 0


def test_the_examples_of_a_template_and_a_metric_train(folder: Path, tune: Any) -> None:
    run = dataclasses.replace(tune, cwd=folder)
    arguments = example("steerlm2/README.md", "sft_distributed --config tiny/acsft output_dir=my_t")
    metric = example("steerlm2/README.md", "sft_distributed --config tiny/acsft output_dir=my_m")
    run(
        *arguments,
        *(word for word in metric if "my_metric." in word),
        *FEW_STEPS,
        *SHORT_VALIDATION,
    )
    *_, last = (folder / "my_template_run" / "metrics.jsonl").read_text().splitlines()
    assert 0 <= json.loads(last)["val_asks_back"] <= 1


def test_the_example_of_a_source_is_written_as_conversations(folder: Path, tune: Any) -> None:
    (block,) = (text for _, text in blocks(text_of("steerlm2/README.md"), "sh") if "printf" in text)
    printed = shlex.split(next(shell_lines(block)))[1]
    (folder / "reviews.tsv").write_text(printed.encode().decode("unicode_escape"))
    run = dataclasses.replace(tune, cwd=folder)
    run(*example("steerlm2/README.md", "prepare_data --config my_source.yaml"))
    lines = [(folder / "reviews" / f"{part}.jsonl").read_text() for part in ("train", "val")]
    assert sorted(json.loads(line)["conversations"][1]["label"] for line in lines) == [
        "stars:3",
        "stars:4",
    ]


def test_a_model_is_asked_with_transformers_as_the_readme_says(
    folder: Path, tune: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model that has learned little."""
    run = dataclasses.replace(tune, cwd=folder)
    run("sft_distributed", "--config", "tiny/acsft", "output_dir=model", *FEW_STEPS,
        *NO_VALIDATION)  # fmt: skip
    (code,) = (text for _, text in blocks(text_of("README.md"), "python"))
    trained, (export,) = (
        "steerlm2_outputs/quickstart/steerlm2_iter2/epoch_12",
        folder.glob("model/epoch_*"),
    )
    assert trained in code
    exec(code.replace(trained, str(export)), {})
    assert capsys.readouterr().out


# What the documents name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_configs_that_a_document_names_exist(document: str) -> None:
    families = "|".join({name.split("/")[0] for name in CONFIG_NAMES})
    named = re.findall(rf"(?<![\w/.])(?:{families})/[\w]+(?![\w./*])", text_of(document))
    assert set(named) <= CONFIG_NAMES


def headings(document: Path) -> set[str]:
    """Their anchors, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(document)):
        path, _, anchor = target.partition("#")
        file = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


def test_the_readme_is_short_and_has_every_recipe() -> None:
    text = text_of("README.md")
    assert len(text.splitlines()) <= 250
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(RECIPES)


def test_every_recipe_has_a_chapter() -> None:
    chapters = re.findall(r"^## (\w+)$", text_of("recipes/README.md"), re.MULTILINE)
    assert set(RECIPES) <= set(chapters)


def test_every_part_of_the_library_is_on_the_map() -> None:
    named = set(re.findall(r"^    (\w+)(?:/|\.py)", text_of("steerlm2/README.md"), re.MULTILINE))
    folders = {path.parent.name for path in (ROOT / "steerlm2").glob("*/__init__.py")}
    assert folders <= named
    assert all(any((ROOT / "steerlm2").glob(f"{name}*")) for name in named)


def literals() -> set[str]:
    """Every text in the code; what is filled into one is left out as a line break."""
    found = set()
    for part in ("recipes", "steerlm2"):
        for file in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.add(
                        "".join(
                            str(value.value) if isinstance(value, ast.Constant) else "\n"
                            for value in node.values
                        )
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_messages_in_the_tables_of_mistakes_are_the_codes() -> None:
    """Each piece between "..." and numbers stands in one text of the code."""
    tables = re.findall(
        r"^\| message \| reason \|\n\|---\|---\|\n((?:\|.*\n)+)",
        text_of("recipes/README.md"),
        re.MULTILINE,
    )
    rows = [row.replace("\\|", "|") for table in tables for row in table.splitlines()]
    cells = [row.removeprefix("| ").rsplit(" | ", 1)[0] for row in rows]
    messages = [message for cell in cells for message in cell.split("`")[1::2]]
    texts = "\0".join(literals()).replace("`", "")
    known = {"HEAD: parameter null or not set"}  # bash says it
    pieces = [
        piece.strip(" ;")
        for message in messages
        if message not in known
        for piece in re.split(r"\.\.\.|\(\)|\bN\b|FILE:LINE:|<\w+>|\b\d\b", message)
    ]
    assert [piece for piece in pieces if piece and piece not in texts] == []


def test_keys_beside_those_of_nemo_aligner_exist() -> None:
    """The first that a row names; `KEYS.md` has all, but of components only the component."""
    known = set(re.findall(r"^\| `([\w.]+)` \|", text_of("recipe_configs/KEYS.md"), re.MULTILINE))
    table = text_of("recipe_configs/README.md").split("| key there | key here |\n|---|---|\n")[1]
    rows = itertools.takewhile(lambda line: line.startswith("|"), table.splitlines())
    cells = [row.split(" | ")[1] for row in rows]
    keys = [re.match(r"[\w.]+", cell.split("`")[1]) for cell in cells if "`" in cell]
    named = {match[0].rstrip(".") for match in keys if match}
    assert {key for key in named if key not in known and key.split(".")[0] not in known} == set()
    assert len(named) > 20
