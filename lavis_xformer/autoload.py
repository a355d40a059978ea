"""Automatic registration: what ``lavis_xformer.pth`` installs when Python starts.

A finder in front of ``sys.meta_path`` waits for two things:

- ``import lavis``: LAVIS is loaded as usual; afterwards :func:`lavis_xformer.register` runs;
- ``lavis.train`` and ``lavis.evaluate``, which LAVIS's wheel lacks: this package's modules take their place.

An interpreter that never imports lavis pays a millisecond. ``LAVIS_XFORMER_AUTOREGISTER=0`` disables it.
"""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import ModuleSpec, SourceFileLoader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

SWITCH = "LAVIS_XFORMER_AUTOREGISTER"
PACKAGE = __name__.rpartition(".")[0]
ENTRY_POINTS = {"lavis.train": "train.py", "lavis.evaluate": "evaluate.py"}


class AnnouncingLoader(SourceFileLoader):
    """Loads a module from its file and reports when it has run."""

    def __init__(self, name: str, path: str, loaded: Callable[[str], None]) -> None:
        super().__init__(name, path)
        self.loaded = loaded

    def exec_module(self, module: ModuleType) -> None:
        """Run the module; its own errors surface unchanged."""
        super().exec_module(module)
        self.loaded(module.__name__)


class LavisFinder:
    """A meta path finder that registers this package once LAVIS is loaded."""

    def __init__(self) -> None:
        self.pending = False  # LAVIS is loaded, this package is not registered yet

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find LAVIS, its entry points and this package's modules; leave all else to others."""
        if name.partition(".")[0] != PACKAGE and name != "lavis" and name not in ENTRY_POINTS:
            return None
        spec = self._ask_others(name, path, target)
        if spec is None and name in ENTRY_POINTS:
            from importlib.util import spec_from_file_location

            file = __file__.replace("autoload.py", ENTRY_POINTS[name])
            return spec_from_file_location(name, file)
        if name == "lavis":
            # Two warnings at every start, from the fairscale that LAVIS pins; users can't fix them.
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"fairscale\.")
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = AnnouncingLoader(spec.loader.name, spec.loader.path, self._loaded)
        return spec

    def _ask_others(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
        return None

    def _loaded(self, name: str) -> None:
        """Register once LAVIS is loaded and no module of this package is half imported.

        The second condition matters when it is one of our modules that imports LAVIS: registering imports all
        of them, and would find that one without its classes.
        """
        if name == "lavis":
            self.pending = True
        if self.pending and not _half_imported(besides=name):
            self.pending = False
            _register()


def _half_imported(besides: str) -> bool:
    return any(
        name.partition(".")[0] == PACKAGE
        and name != besides
        and getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
    )


def _register() -> None:
    from lavis_xformer import register

    try:
        register()
    except Exception as error:
        raise ImportError(
            f"lavis_xformer could not register with LAVIS: {type(error).__name__}: {error}. "
            f"`lavis-xformer doctor` checks the environment; {SWITCH}=0 leaves this package out."
        ) from error


def install() -> None:
    """Install the finder, unless it is installed already."""
    if not any(type(finder) is LavisFinder for finder in sys.meta_path):
        sys.meta_path.insert(0, LavisFinder())
