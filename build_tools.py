"""What setup.py builds with: steps that are redone exactly when what they came from changed, and compilers to trust.

A step is one run of a compiler. Beside its output lies a record of the command, the compiler's identity and the
contents of every file that the compiler read, as it listed them itself (``-MD``: system and torch headers too), and of
the output. The output is current while all of these are what they were, whatever their dates say.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

# What changes the work of a compiler from outside its command line.
ENVIRONMENT = ("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH")
NVCC_ENVIRONMENT = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
COMPILERS = ("g++", "c++", "clang++")
# Throwing takes the C++ runtime from where a library of this compiler would take it.
PROBE = """#include <stdexcept>
extern "C" void probe() { throw std::runtime_error("thrown across the boundary of a library"); }
"""


class BuildError(Exception):
    """The build cannot go on; the message is for whoever started it."""


@functools.cache
def digest(path: Path) -> str | None:
    """A hash of the file's contents, read once per process; None where there is no file."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return None


@functools.cache
def identity(*command: str) -> str:
    """Which compiler a command runs: its path, contents and version, and the variables that it reads.

    Contents, because a wrapper script's version is that of the compiler it calls, whatever flags it adds.
    """
    path = shutil.which(command[0])
    if path is None:
        raise BuildError(f"expected a compiler, got {command[0]!r}, which is not on PATH")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace").stdout
    return "\n".join([path, str(digest(Path(path).resolve())), version, *environment(ENVIRONMENT)])


def environment(names: Iterable[str]) -> list[str]:
    return [f"{name}={os.environ[name]}" for name in names if name in os.environ]


def split_command(text: str) -> tuple[str, ...]:
    """``$CXX`` as a command: a path (with spaces or not), or a compiler with arguments, as in ``ccache g++``."""
    return (text,) if shutil.which(text) else tuple(shlex.split(text))


@dataclass(frozen=True)
class Step:
    """One run of a compiler, which writes ``output``.

    ``finds_headers``: the command compiles, and the compiler is asked what it read; otherwise it read ``inputs``.
    ``check`` may raise BuildError over what was written; then there is no output.
    """

    title: str  # "compiling csrc/cpu/gemm.cpp", for whoever waits
    command: tuple[str, ...]  # without -o and the flags that ask for dependencies
    compiler: str  # its identity
    output: Path
    inputs: tuple[Path, ...]
    finds_headers: bool = False
    check: Callable[[Path], None] | None = field(default=None, compare=False)

    @property
    def _record(self) -> Path:
        return self.output.with_name(self.output.name + ".json")

    def is_current(self) -> bool:
        try:
            record = json.loads(self._record.read_text())
            made_by, read, wrote = record["made_by"], record["read"], record["wrote"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        inputs = {str(path) for path in self.inputs}
        return (
            # A full disk or a power cut can leave fewer bytes than were written, which a linker may take for a script.
            wrote is not None
            and wrote == digest(self.output)
            and made_by == [*self.command, self.compiler]
            and (inputs <= read.keys() if self.finds_headers else inputs == read.keys())
            and all(known is not None and known == digest(Path(path)) for path, known in read.items())
        )

    def run(self) -> str:
        """Runs the compiler and returns what it said.

        The output appears under its name only when it is whole, and its record after it: whatever interrupts this
        leaves a step that is not current.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._record.unlink(missing_ok=True)
        partial = self.output.with_name(f"partial-{os.getpid()}-{self.output.name}")
        listing = partial.with_name(partial.name + ".d")
        try:
            listing.touch()
            started = listing.stat().st_mtime_ns  # by the clock that dates the sources
            ask = ("-MD", "-MF", str(listing)) if self.finds_headers else ()
            command = [*self.command, *ask, "-o", str(partial)]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
            if done.returncode != 0:
                raise BuildError(f"{self.title} failed ({done.returncode}):\n{shlex.join(command)}\n{done.stdout}")
            if self.check is not None:
                self.check(partial)
            read = {*self.inputs, *(listed_files(listing.read_text()) if self.finds_headers else ())}
            record = {
                "made_by": [*self.command, self.compiler],
                "read": {str(path): _digest_unless_newer(path, started) for path in sorted(read)},
                "wrote": digest(partial),
            }
            os.replace(partial, self.output)
            digest.cache_clear()  # the output may be another step's input
            write_atomically(self._record, json.dumps(record, indent=1).encode())
            return done.stdout
        finally:
            partial.unlink(missing_ok=True)
            listing.unlink(missing_ok=True)


def _digest_unless_newer(path: Path, started: int) -> str | None:
    """None for a file that was edited while the compiler may have read it: its step is not current next time."""
    return digest(path) if path.stat().st_mtime_ns <= started else None


def listed_files(listing: str) -> list[Path]:
    """The prerequisites in a dependency file as gcc, clang and nvcc write it."""
    _, _, names = listing.replace("\\\n", " ").partition(": ")
    return [Path(re.sub(r"\\([ #])", r"\1", name).replace("$$", "$")) for name in re.findall(r"(?:\\[ #]|\S)+", names)]


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Whoever reads or has mapped the file that was there keeps it whole."""
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    try:
        partial.write_bytes(content)
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def place(source: Path, target: Path) -> None:
    """Copies a finished library, unless the same one is there: a running process may have it mapped."""
    content = source.read_bytes()
    if not target.exists() or target.read_bytes() != content:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content, mode=0o755)


def run_steps(steps: Iterable[Step], jobs: int, log: Callable[[str], None], force: bool = False) -> None:
    """Runs those that are not current, ``jobs`` at a time. After a failure no new one starts."""
    stale = [step for step in steps if force or not step.is_current()]

    def run(numbered: tuple[int, Step]) -> None:
        number, step = numbered
        log(f"{step.title} ({number} of {len(stale)})" if len(stale) > 1 else step.title)
        said = step.run().rstrip()
        if said:
            log(said)

    pool = ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(run, numbered) for numbered in enumerate(stale, 1)]
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        pool.shutdown(cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


@contextlib.contextmanager
def exclusive(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """One build at a time in a folder; what a killed one was writing is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another build in {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in folder.rglob("partial-*"):
            leftover.unlink()
        yield


def needed_libraries(path: Path) -> list[str] | None:
    """The shared libraries that an ELF file asks the loader for (DT_NEEDED); None for another kind of file."""
    data = path.read_bytes()
    if data[:4] != b"\x7fELF":
        return None
    order, wide = ("<" if data[5] == 1 else ">"), data[4] == 2
    (table,) = struct.unpack_from(order + ("Q" if wide else "I"), data, 32 if wide else 28)
    entry_size, count = struct.unpack_from(order + "HH", data, 54 if wide else 42)
    # type, (flags,) offset in the file, address, physical address, size in the file
    layout, offset_at = (order + "IIQQQQ", 2) if wide else (order + "IIIII", 1)
    segments = [struct.unpack_from(layout, data, table + index * entry_size) for index in range(count)]
    loaded = [segment[offset_at:] for segment in segments if segment[0] == 1]  # PT_LOAD
    entries: list[tuple[int, int]] = []
    for segment in segments:
        if segment[0] == 2:  # PT_DYNAMIC
            offset, _, _, size = segment[offset_at:]
            entries += struct.iter_unpack(order + ("QQ" if wide else "II"), data[offset : offset + size])
    strings = next((value for tag, value in entries if tag == 5), 0)  # DT_STRTAB, an address
    for offset, address, _, size in loaded:
        if address <= strings < address + size:
            strings += offset - address
            break
    names = [strings + value for tag, value in entries if tag == 1]  # DT_NEEDED
    return [data[start : data.index(b"\0", start)].decode() for start in names]


def torch_runtime(root: Path) -> str | None:
    """The C++ runtime of torch's own libraries, as libstdc++.so.6; None where they cannot say (not Linux)."""
    library = root / "lib" / "libc10.so"
    needed = needed_libraries(library) if library.exists() else None
    return next((name for name in needed or () if name.startswith(("libstdc++", "libc++"))), None)


def check_runtime(library: Path, runtime: str | None) -> None:
    """Raises BuildError where a library has a C++ runtime of its own beside torch's.

    An error that it throws is then nobody's to catch, and can end the process; and each runtime takes the other's
    locale facets for its own.
    """
    needed = needed_libraries(library) if runtime else None
    if needed is not None and runtime not in needed:
        raise BuildError(f"expected a library that needs {runtime}, as torch's do, got one that needs {needed}")


@dataclass(frozen=True)
class Candidate:
    """A compiler that might build a library."""

    name: str  # as its user knows it
    command: tuple[str, ...]
    link: tuple[str, ...]  # the flags with which it makes a library of one C++ source
    compiler: str  # its identity


def trusted(
    candidates: Sequence[Candidate], runtime: str | None, folder: Path, log: Callable[[str], None]
) -> Candidate:
    """The first candidate whose libraries use torch's C++ runtime.

    A compiler that links its runtime statically (``-static-libstdc++``) is passed over with words. Raises BuildError
    where no candidate is left, and where the first, which is the one asked for, cannot link at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "probe.cpp"
    if not source.exists() or source.read_text() != PROBE:
        write_atomically(source, PROBE.encode())
    problems: list[str] = []
    for candidate in candidates:
        key = hashlib.blake2b("\n".join([*candidate.command, candidate.compiler]).encode(), digest_size=8).hexdigest()
        command, library = (*candidate.command, *candidate.link, str(source)), folder / f"probe-{key}.so"
        step = Step(f"trying {candidate.name}", command, candidate.compiler, library, (source,))
        try:
            if not step.is_current():
                step.run()
            check_runtime(library, runtime)
        except BuildError as error:
            if candidate is candidates[0] and not library.exists():
                raise
            problems.append(f"{candidate.name}: {error}")
            continue
        if problems:
            log(
                f"{problems[0]}. The compiler links its C++ runtime statically (-static-libstdc++?), so an error that "
                f"a kernel raises could end the process. Building with {candidate.name} instead."
            )
        return candidate
    tried = "\n".join(problems) or f"none of {', '.join(COMPILERS)} on PATH"
    raise BuildError(
        f"expected a C++ compiler whose libraries need {runtime or 'libstdc++'}, as torch's do, got\n{tried}\n"
        "Install g++ (Debian and Ubuntu: apt-get install g++), or name a compiler that links its runtime dynamically "
        "as CXX (for nvcc: as NVCC_CCBIN)."
    )


def cxx_candidates(wanted: str | None) -> list[Candidate]:
    """``$CXX``, which has to be there where it is set, then the compilers on PATH."""
    named = {}
    if wanted:
        named[f"CXX={wanted}"] = split_command(wanted)
        if shutil.which(named[f"CXX={wanted}"][0]) is None:
            raise BuildError(f"CXX: expected a C++ compiler, got {wanted!r}, which is not on PATH")
    named |= {name: (name,) for name in COMPILERS if shutil.which(name)}
    link = ("-std=c++17", "-shared", "-fPIC")
    return [Candidate(name, command, link, identity(*command)) for name, command in named.items()]


def chosen_cxx(root: Path, folder: Path, log: Callable[[str], None]) -> str:
    """The compiler that the build takes with the torch in ``root``, for those who compile as they run (Inductor)."""
    candidates = cxx_candidates(os.environ.get("CXX"))
    return shlex.join(trusted(candidates, torch_runtime(root), folder, log).command)


def nvcc_candidates(nvcc: str) -> list[Candidate]:
    """nvcc with the host compiler that it takes by itself, then with those on PATH: it links with its host compiler."""

    def candidate(name: str, host: str, *choice: str) -> Candidate:
        found = split_command(host)
        compilers = [identity(nvcc), identity(*found) if shutil.which(found[0]) else host]
        command, link = (nvcc, *choice), ("-shared", "-cudart", "none", "-Xcompiler", "-fPIC")
        return Candidate(name, command, link, "\n".join([*compilers, *environment(NVCC_ENVIRONMENT)]))

    own = os.environ.get("NVCC_CCBIN", "g++")
    own = f"{own}/g++" if Path(own).is_dir() else own
    hosts = [name for name in COMPILERS if shutil.which(name)]
    named = [candidate(f"{nvcc} -ccbin {host}", host, "-ccbin", host) for host in hosts]
    return [candidate(f"{nvcc} with its own host compiler", own), *named]


if __name__ == "__main__":  # prints the compiler to run with as CXX
    torch = importlib.util.find_spec("torch")
    try:
        if torch is None or torch.origin is None:
            raise BuildError("expected an installed torch, found none")
        probes = Path(__file__).resolve().parent / "build" / "objects" / "probes"
        print(chosen_cxx(Path(torch.origin).parent, probes, functools.partial(print, file=sys.stderr)))
    except BuildError as error:
        raise SystemExit(f"torch_nvfp4: {error}") from None
