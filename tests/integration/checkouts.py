"""The trainers themselves, where an environment variable names a checkout of one.

Their packages want much that has nothing to do with a loss (audio, augmentation, other frameworks). What is not installed is
replaced by an inert stand-in while the trainer's module is imported; the functions under test are the trainer's own.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings

import pytest

# Imported by the trainers at module level and used by none of the functions that the tests call.
UNRELATED = {
    "AI_TOOLKIT_REPO": """albumentations torchao torchaudio optimum dotenv einops lycoris oyaml hpsv2 open_clip lpips timm
        controlnet_aux k_diffusion prodigyopt pytorch_wavelets flatten_json soundfile torchcodec librosa kornia slugify ftfy
        omegaconf gguf""",
    "SD_SCRIPTS_REPO": "einops imagesize toml voluptuous bitsandbytes rich sentencepiece",
    "ONETRAINER_REPO": "mgds",
    "DIFFUSION_PIPE_REPO": "comfy comfy_api deepspeed torchaudio imageio toml datasets hjson",
    "SIMPLETUNER_REPO": "torchaudio",
}
# Its own modules that need an older transformers than the one installed: sampling pipelines.
BROKEN = {"SD_SCRIPTS_REPO": ["library.lpw_stable_diffusion", "library.sdxl_lpw_stable_diffusion"]}


class _Anything(type):
    """Classes that have every attribute, can be called, derived from and used as decorators."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __or__(cls, other):
        return cls

    __ror__ = __or__

    def __call__(cls, *arguments, **_):
        if len(arguments) == 1 and isinstance(arguments[0], types.FunctionType):
            return arguments[0]
        return super().__call__() if cls.__init__ is object.__init__ else super().__call__(*arguments, **_)


class _StandIn(types.ModuleType):
    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def checkout(variable: str, monkeypatch):
    """`load(module)` imports from the checkout that the variable names; skips the test, saying so, where it names none.

    Everything that was imported is forgotten at the end: several trainers have a package called `models` or `utils`.
    """
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"set {variable} to a checkout of the trainer to run this against its own code")
    before = dict(sys.modules)
    names = {name for name in UNRELATED[variable].split() if importlib.util.find_spec(name.split(".")[0]) is None}
    finder = _Finder(names)
    sys.meta_path.append(finder)
    for name in BROKEN.get(variable, ()):
        sys.modules[name] = _StandIn(name)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    # warnings and loggers of the trainer are its own business
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield importlib.import_module
        finally:
            sys.meta_path.remove(finder)
            new = set(sys.modules) - set(before)
            folder = os.path.abspath(folder)
            theirs = {
                name.split(".")[0]
                for name in new
                if isinstance(sys.modules[name], _StandIn)
                or (getattr(sys.modules[name], "__file__", None) or "").startswith(folder)
            }
            for name in new:
                if name.split(".")[0] in theirs:
                    del sys.modules[name]
