"""What holds for the package and the repository as a whole."""

import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import sssd
from sssd import _core

ROOT = Path(__file__).parent.parent


def test_import_is_light_and_quiet():
    code = (
        "import os, sys, numpy\n"
        "threads = os.listdir('/proc/self/task') if os.path.exists('/proc/self/task') else []\n"
        "import sssd\n"
        "heavy = {'torch', 'transformers', 'rich', 'tokenizers', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not threads or os.listdir('/proc/self/task') == threads\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_command_line_names_what_it_lacks():
    code = "import sys; sys.modules['rich'] = None; from sssd.cli import main; main(['info', 'x'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'sssd[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_package_is_typed_and_versioned():
    package = resources.files("sssd")
    assert package.joinpath("py.typed").is_file()
    assert package.joinpath("_core.pyi").is_file()
    assert metadata.version("sssd") == sssd.__version__
    assert metadata.metadata("sssd")["License-Expression"] == "Apache-2.0"
    assert [r for r in metadata.requires("sssd") or [] if "extra" not in r] == ["numpy>=1.26"]


def test_tests_run_on_a_release_build():
    assert _core.build_profile == "release"


def test_everything_compiled_is_public_somewhere():
    from sssd import datastore, hardware

    names = {name for name in dir(_core) if isinstance(getattr(_core, name), type)}
    assert names <= set(sssd.__all__) | set(datastore.__all__) | set(hardware.__all__)


def test_classes_are_frozen():
    for file in (ROOT / "rust/sssd-py/src").glob("*.rs"):
        for arguments in re.findall(r"#\[pyclass\((.*?)\)\]", file.read_text(), re.S):
            assert "frozen" in arguments, f"{file.name}: {arguments}"


def test_no_program_is_called_sssd():
    """That name belongs to the System Security Services Daemon."""
    assert not [entry for entry in metadata.distribution("sssd").entry_points if entry.name == "sssd"]
