"""torchtune's own `tune` knows our recipes, in real virtual environments.

Each environment gets its own torchtune, hence its own `tune`, and steerlm2 in one of four ways.
The heavy dependencies are those of the environment that runs the tests: a path line adds its
site-packages, whose own start-up files Python doesn't run.
"""

import argparse
import contextlib
import csv
import functools
import io
import os
import shutil
import subprocess
import sys
import types
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from fork_server import ForkServer

from steerlm2 import _tune

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE_NAMES = list(_tune.RECIPES)
CONFIG_NAMES = [config for configs in _tune.RECIPES.values() for config in configs]
pytestmark = pytest.mark.slow

INSTALLS = ["pip", "pip editable", "uv", "uv editable"]
PRINT_FINDERS = "import sys; print(*map(str, sys.meta_path))"
UNKNOWN_KEY = "no_such_key=1"  # every recipe answers it by name, before it does any work


@dataclass(frozen=True)
class Environment:
    """A virtual environment at `root`, steerlm2 being installed `how` (one of INSTALLS) or not."""

    root: Path
    how: str = ""

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        (folder,) = self.root.glob("lib/python*/site-packages")
        return folder

    def run(self, *command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's programs in its root, a folder that isn't the checkout."""
        program, *arguments = command
        return subprocess.run(
            [self.root / "bin" / program, *arguments],
            cwd=self.root,
            env=clean_variables() | variables,
            capture_output=True,
            text=True,
        )

    def output(self, *command: str | Path, **variables: str) -> str:
        """Run a program that must succeed, and return its standard output."""
        result = self.run(*command, **variables)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def missing_files(self, distribution: str) -> list[str]:
        """Return which of its files a distribution lacks."""
        (record,) = self.site_packages.glob(f"{distribution}-*.dist-info/RECORD")
        files = [row[0] for row in csv.reader(record.read_text().splitlines())]
        return [file for file in files if not (self.site_packages / file).exists()]

    def leftovers(self) -> list[str]:
        """Return everything in site-packages that bears our name."""
        paths = (path.relative_to(self.site_packages) for path in self.site_packages.rglob("*"))
        return sorted(str(path) for path in paths if "steerlm2" in str(path))


def clean_variables() -> dict[str, str]:
    """Return the process's variables without those that would let the checkout shine through.

    uv doesn't read pip's variables: whoever has told pip where to find packages has told uv.
    """
    variables = dict(os.environ)
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "STEERLM2_NO_TUNE"):
        variables.pop(name, None)
    for pip_name, uv_name in {
        "PIP_FIND_LINKS": "UV_FIND_LINKS",
        "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
        "PIP_EXTRA_INDEX_URL": "UV_INDEX",
        "PIP_CERT": "SSL_CERT_FILE",
    }.items():
        if pip_name in variables:
            variables.setdefault(uv_name, variables[pip_name])
    return variables


def run_here(*arguments: str | Path) -> None:
    """Run a module of the Python that runs the tests."""
    result = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        env=clean_variables(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def install(environment: Environment) -> None:
    """Install steerlm2 from the checkout."""
    source = ["-e", "."] if environment.how.endswith("editable") else ["."]
    if environment.how.startswith("uv"):
        run_here("uv", "pip", "install", "--python", environment.python, "--no-deps", *source)
    else:
        run_here("pip", "--python", environment.python, "install", "--no-deps", *source)


def uninstall(environment: Environment) -> None:
    """Uninstall steerlm2 with the installer that installed it."""
    if environment.how.startswith("uv"):
        run_here("uv", "pip", "uninstall", "--python", environment.python, "steerlm2")
    else:
        run_here("pip", "--python", environment.python, "uninstall", "--yes", "steerlm2")


def create_environment(root: Path, how: str) -> Environment:
    """Create a virtual environment with a `tune` of its own and with steerlm2, installed `how`."""
    venv.create(root, symlinks=True)
    environment = Environment(root, how)
    run_here(
        *("uv", "pip", "install", "--python", environment.python, "--compile-bytecode"),
        *("--no-deps", "torchtune==0.6.1"),
    )
    install(environment)
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (environment.site_packages / "dependencies.pth").write_text("\n".join(here))
    return environment


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Environment]:
    """One for each way to install, made when it is first asked for."""
    return functools.cache(
        lambda how: create_environment(tmp_path_factory.mktemp("installed"), how)
    )


@pytest.fixture(scope="module", params=INSTALLS)
def installed(
    request: pytest.FixtureRequest, environments: Callable[[str], Environment]
) -> Environment:
    return environments(request.param)


@pytest.fixture(scope="module")
def wheel(environments: Callable[[str], Environment]) -> Environment:
    """For what depends on where the files lie: all other tests run from a checkout."""
    return environments("pip")


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run_script(wheel: Environment) -> Iterator[Run]:
    """`run_script(file, *arguments)`: in forks of one interpreter of that environment, for what
    imports torch."""
    server = ForkServer(wheel.python, clean_variables())

    def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = server.start([script, *arguments], cwd=wheel.root, env=clean_variables())
        stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode or 0, stdout, stderr)

    yield run
    server.close()


@pytest.fixture(scope="module")
def tune(wheel: Environment, run_script: Run) -> Run:
    """`tune` of that environment."""
    return functools.partial(run_script, wheel.root / "bin" / "tune")


@pytest.fixture(scope="module")
def listed_by_torchtune() -> str:
    """What its `tune ls` prints without ours."""
    from torchtune._cli import ls
    from torchtune._cli.tune import main

    theirs = [recipe for recipe in ls.get_all_recipes() if recipe.name not in _tune.RECIPES]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        patch.setattr(ls, "get_all_recipes", lambda: theirs)
        patch.setattr(sys, "argv", ["tune", "ls"])
        main()
    return printed.getvalue()


@pytest.fixture
def bare(tmp_path: Path) -> Environment:
    """A virtual environment without any package."""
    venv.create(tmp_path, symlinks=True)
    return Environment(tmp_path)


@pytest.fixture(params=["pip", "uv editable"])
def listed(
    request: pytest.FixtureRequest, environments: Callable[[str], Environment], tune: Run
) -> str:
    """What `tune ls` prints: a wheel's in a fork, a checkout's by the command itself."""
    if request.param == "pip":
        return tune("ls").stdout
    return environments(request.param).output("tune", "ls")


def test_ls_lists_ours_after_torchtunes(listed: str, listed_by_torchtune: str) -> None:
    """Ours come last, as the table has them, and torchtune's keep their places."""
    ours, theirs = listed, listed_by_torchtune

    assert "full_finetune_distributed" in theirs
    assert not any(name in theirs for name in RECIPE_NAMES + CONFIG_NAMES)
    assert ours.startswith(theirs)
    names = ours.removeprefix(theirs).split()
    without_configs = ["<>"]  # as torchtune shows it
    assert names == [
        name
        for recipe in RECIPE_NAMES
        for name in (recipe, *(_tune.RECIPES[recipe] or without_configs))
    ]


def test_every_install_adds_our_recipes(installed: Environment, tmp_path: Path) -> None:
    """To a registry in torchtune's place, which is imported without torch; unless a variable says
    that it is to have its own alone."""
    (tmp_path / "torchtune").mkdir()
    (tmp_path / "torchtune" / "__init__.py").touch()
    (tmp_path / "torchtune" / "_recipe_registry.py").write_text(
        "from types import SimpleNamespace as Recipe\nConfig, _ALL_RECIPES = Recipe, []\n"
    )
    code = "import torchtune._recipe_registry as r; print(*(each.name for each in r._ALL_RECIPES))"
    names = installed.output("python", "-c", code, PYTHONPATH=str(tmp_path)).split()
    assert names == RECIPE_NAMES
    off = {"PYTHONPATH": str(tmp_path), "STEERLM2_NO_TUNE": "1"}
    assert installed.output("python", "-c", code, **off).split() == []


def test_recipes_come_from_the_package_or_from_the_checkout(installed: Environment) -> None:
    """A wheel carries its own copies, clear of torchtune's `recipes`; an editable install none."""
    code = "from steerlm2._tune import recipe_directories; print(*recipe_directories(), sep='\\n')"

    folders = [Path(line) for line in installed.output("python", "-c", code).splitlines()]

    package = installed.site_packages / "steerlm2"
    if installed.how.endswith("editable"):
        assert folders == [REPOSITORY / "recipes", REPOSITORY / "recipe_configs"]
        assert not package.exists()
    else:
        assert folders == [package / "_recipes", package / "_recipe_configs"]


def test_a_wheel_has_the_files_of_the_page(wheel: Environment) -> None:
    folder = wheel.site_packages / "steerlm2" / "serving" / "page"
    names = {path.name for path in folder.iterdir()}
    assert {"index.html", "page.css", "page.js"} <= names


def test_the_page_of_a_report_has_its_template(run_script: Run, tmp_path: Path) -> None:
    script = tmp_path / "report.py"
    script.write_text(
        "from steerlm2.evaluation.report import SteeringResult, html_page\n"
        "rows = [dict(attribute='wit', requested=4, mean_score=3.5, std_score=0.5)]\n"
        "print(html_page({'mine': SteeringResult({'steering_mae': 0.5}, rows, {})}))"
    )
    assert run_script(script).stdout.startswith("<!doctype html>")


def test_cp_and_cat_a_config(wheel: Environment, tune: Run) -> None:
    """`tune cp` gives the file to the byte; `tune cat` prints its values, formatted anew."""
    name = "llama3_1/70B_steerlm2_multinode"
    source = (REPOSITORY / "recipe_configs" / f"{name}.yaml").read_bytes()

    tune("cp", name, "my.yaml")
    printed = tune("cat", name).stdout

    assert (wheel.root / "my.yaml").read_bytes() == source
    assert yaml.safe_load(printed) == yaml.safe_load(source)


def test_run_by_name(tune: Run) -> None:
    """The recipe itself answers: it refuses a key that it doesn't know."""
    result = tune("run", "prepare_data", "--config", "data/oasst_groups", UNKNOWN_KEY)

    assert result.returncode != 0
    assert "no_such_key" in result.stderr


def test_run_an_edited_copy(wheel: Environment, tune: Run) -> None:
    """A recipe copied with `tune cp` and then edited runs by its path, with a built-in config."""
    main = 'if __name__ == "__main__":'
    copy = wheel.root / "my_recipe.py"

    tune("cp", "prepare_data", copy.name)
    text = copy.read_text()
    assert text == (REPOSITORY / "recipes" / "prepare_data.py").read_text()
    copy.write_text(text.replace(main, f'{main}\n    print("edited copy")'))
    result = tune("run", copy.name, "--config", "data/oasst_groups", UNKNOWN_KEY)

    assert "edited copy" in result.stdout
    assert "no_such_key" in result.stderr


@pytest.mark.parametrize("how", ["pip", "uv editable"])
def test_uninstall_leaves_torchtune_and_nothing_else(
    tmp_path: Path, environments: Callable[[str], Environment], how: str
) -> None:
    """In a copy of the environment. What Python wrote at run time (__pycache__) goes too; torchtune
    keeps all that it had, and is found by nobody but itself."""
    shutil.copytree(environments(how).root, tmp_path / "copy", symlinks=True)
    environment = Environment(tmp_path / "copy", how)
    assert "steerlm2_tune.pth" in environment.leftovers()
    environment.output("python", "-c", "import steerlm2._tune", PYTHONDONTWRITEBYTECODE="")

    uninstall(environment)

    assert environment.leftovers() == []
    assert environment.missing_files("torchtune") == []
    assert "SteerLM2Finder" not in environment.output("python", "-c", PRINT_FINDERS)


def loaded_modules(environment: Environment) -> set[str]:
    """Return the names of the modules that a fresh interpreter has loaded."""
    result = environment.run("python", "-c", "import sys; print(*sys.modules)")
    assert (result.returncode, result.stderr) == (0, "")
    return set(result.stdout.split())


def put_pth(environment: Environment) -> None:
    """Put the start-up file where an installer puts it."""
    text = (REPOSITORY / "steerlm2" / "_tune.pth").read_text()
    (environment.site_packages / "steerlm2_tune.pth").write_text(text)


def test_start_up_imports_nothing(installed: Environment, bare: Environment) -> None:
    """A fresh interpreter has the same modules with and without steerlm2: none is torch or ours."""
    modules = loaded_modules(installed)

    assert modules == loaded_modules(bare)
    assert modules.isdisjoint({"steerlm2", "torch", "torchtune"})


def test_start_up_puts_one_finder(bare: Environment) -> None:
    """Python reads the start-up files of a virtual environment twice."""
    put_pth(bare)

    printed = bare.output("python", "-c", PRINT_FINDERS)

    assert printed.count("SteerLM2Finder") == 1


@pytest.mark.parametrize("source", [None, "def unfinished("], ids=["no package", "broken package"])
def test_half_removed_package_harms_nobody(bare: Environment, source: str | None) -> None:
    """The start-up file without its package is silent until `tune` asks, and then says one line."""
    put_pth(bare)
    packages = {"torchtune/__init__.py": "", "torchtune/_recipe_registry.py": "_ALL_RECIPES = []"}
    if source is not None:
        packages |= {"steerlm2/__init__.py": "", "steerlm2/_tune.py": source}
    for name, text in packages.items():
        (bare.site_packages / name).parent.mkdir(exist_ok=True)
        (bare.site_packages / name).write_text(text)

    started = bare.run("python", "-c", "pass")
    asked = bare.run(
        "python", "-c", "from torchtune._recipe_registry import _ALL_RECIPES; print(_ALL_RECIPES)"
    )

    assert (started.returncode, started.stderr) == (0, "")
    assert (asked.returncode, asked.stdout) == (0, "[]\n")
    assert len(asked.stderr.splitlines()) == 1
    assert "reinstall or uninstall" in asked.stderr


def names_on_disk(folder: str, suffix: str) -> Iterator[str]:
    """Yield the names, as `tune` writes them, of the files below a folder of the repository."""
    for path in (REPOSITORY / folder).rglob(f"*{suffix}"):
        yield path.relative_to(REPOSITORY / folder).with_suffix("").as_posix()


def test_table_names_every_recipe_file() -> None:
    assert sorted(RECIPE_NAMES) == sorted(names_on_disk("recipes", ".py"))


def test_table_names_every_config_file_once() -> None:
    assert sorted(CONFIG_NAMES) == sorted(names_on_disk("recipe_configs", ".yaml"))


def torchtune_like_registry() -> types.ModuleType:
    """Return a module with what `add_recipes` uses of torchtune's registry."""
    registry = types.ModuleType("registry")
    record: Callable[..., types.SimpleNamespace] = types.SimpleNamespace
    vars(registry).update(Recipe=record, Config=record, _ALL_RECIPES=[])
    return registry


def test_entries_are_absolute_files_that_exist() -> None:
    """An absolute path overrides the folder that `tune` joins it to."""
    registry = torchtune_like_registry()

    _tune.add_recipes(registry)

    for recipe in registry._ALL_RECIPES:
        for path in [recipe.file_path, *(config.file_path for config in recipe.configs)]:
            assert Path(path).is_absolute()
            assert Path(path).is_file()


def test_only_single_process_recipes_refuse_torchrun() -> None:
    registry = torchtune_like_registry()

    _tune.add_recipes(registry)

    refusing = {entry.name for entry in registry._ALL_RECIPES if not entry.supports_distributed}
    assert refusing == {
        *("prepare_data", "serve_reward", "serve_steerlm", "chat"),
        *("steerlm2_pipeline", "plan_memory"),
    }


def test_names_are_not_torchtunes() -> None:
    """`tune` takes the first entry of a name, so one of torchtune's would hide ours."""
    from torchtune._recipe_registry import get_all_recipes

    theirs = [recipe for recipe in get_all_recipes() if recipe.name not in _tune.RECIPES]
    their_names = {recipe.name for recipe in theirs}
    their_names |= {config.name for recipe in theirs for config in recipe.configs}

    assert len(theirs) > 0
    assert their_names.isdisjoint(RECIPE_NAMES + CONFIG_NAMES)


def test_unknown_registry_is_left_alone_with_a_warning() -> None:
    registry = types.ModuleType("registry")

    with pytest.warns(UserWarning, match=r"Install torchtune==0\.6\.1"):
        _tune.add_recipes(registry)

    assert not hasattr(registry, "_ALL_RECIPES")


def tune_run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Run torchtune's `tune run`, as start-up has changed it, in this process; its exit status."""
    from torchtune._cli.tune import main

    monkeypatch.setattr(sys, "argv", ["tune", "run", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["-h", "sft_distributed"]])
def test_help_of_tune_run_is_torchtunes(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune_run(arguments, monkeypatch) == 0
    assert "Name or path to recipe to be launched followed by args." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["full_finetune_distributed", "--help"], ["sft_distributed"], ["sft_distributed", "help=1"]],
)
def test_tune_run_asks_for_a_config_as_before(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune_run(arguments, monkeypatch) == 2
    assert "The '--config' argument is required." in capsys.readouterr().err


def test_unknown_tune_run_is_left_alone() -> None:
    cli_run = types.ModuleType("run")

    _tune.adapt_run(cli_run)

    assert not hasattr(cli_run, "Run")


class InterruptedRun:
    """`tune run` that Ctrl-C ends while it imports a recipe."""

    def _run_cmd(self, args: argparse.Namespace) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_during_the_imports_of_a_recipe_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of ours; torchtune's own recipes end as ever."""
    cli_run = types.ModuleType("run")
    vars(cli_run).update(Run=type("Run", (InterruptedRun,), {}), get_all_recipes=lambda: [])
    _tune.adapt_run(cli_run)
    run = cli_run.Run()
    with pytest.raises(SystemExit) as ended:
        run._run_cmd(argparse.Namespace(recipe="chat", recipe_args=[]))
    assert ended.value.code == 130
    assert capsys.readouterr().err == "SIGINT: stopped\n"
    with pytest.raises(KeyboardInterrupt):
        run._run_cmd(argparse.Namespace(recipe="full_finetune_distributed", recipe_args=[]))
