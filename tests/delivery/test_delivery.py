"""What is published proves itself: `doit verify`, `doit sign` and `doit push`."""

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from build_tasks.provenance import signature
from build_tasks.provenance.published_versions import write_manifest
from build_tasks.provenance.signature import Identity
from build_tasks.provenance.verify_repository import check, files_of, model_folders, read_files
from tests.support.cache_server import s3
from tests.support.project import OTHER, Project

CopyOf = Callable[[Project], Project]
PUBLISHED = "model_repository/net"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("delivery") / "project")
    project.model("net", OTHER)
    project.built()
    return project


@pytest.fixture
def project(original: Project, copy_of: CopyOf) -> Project:
    """A project with a published model, built in another folder."""
    return copy_of(original)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pairs of keys: a.pem and a.pub, b.pem and b.pub."""
    pytest.importorskip("model_signing")
    folder = tmp_path_factory.mktemp("keys")
    for name in "ab":
        private = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.pem"]
        public = ["openssl", "ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub"]
        for command in (private, public):
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def flip(path: Path, position: int) -> None:
    """Change one bit of a file, and keep its size and its times."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_verify_finds_what_doit_cannot_see_and_heals_it(project: Project) -> None:
    """A bit flips on the disk: no time changes, also not the ctime. Here the digest cache is told so."""
    project.built()
    assert project.doit("verify").code == 0
    damaged = ["build/net/weights.safetensors", "build/net/model.pt", "build/net/model.pt.verdict.json"]
    published = ["config.pbtxt", "preprocessing.json", "1/model.pt", "1/provenance.json", "SHA256SUMS"]
    for index, name in enumerate([*damaged, *(f"{PUBLISHED}/{name}" for name in published)]):
        flip(project / name, 100 * index)
    keep_cached_digests(project)
    assert project.built().ran == [], "a build believes the size and the times"
    run = project.doit("verify")
    assert run.code == 1
    for name in damaged:
        assert f"{name}: changed" in run.out
    assert f"✗ {PUBLISHED}: SHA256SUMS: line" in run.out or f"✗ {PUBLISHED}: " in run.out
    assert f"{len(damaged) + 1} not as it was built and published" in run.out
    healed = project.doit("verify", "--heal")
    assert healed.code == 0, healed.out
    assert {"weights:net", "torchscript:net", "accuracy:net", "publish:net"} <= {*healed.ran}
    assert project.doit("verify").code == 0
    assert project.built().ran == []


def keep_cached_digests(project: Project) -> None:
    """Give the digest cache the present identity of each file with the old digest: the kernel cannot keep a ctime."""
    program = (
        "import os, sqlite3\n"
        "table = sqlite3.connect('build/.digests.sqlite3')\n"
        "for (path,) in table.execute('select path from digests').fetchall():\n"
        "    s = os.stat(path) if os.path.exists(path) else None\n"
        "    identity = s and f'{s.st_dev}:{s.st_ino}:{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}'\n"
        "    table.execute('update digests set identity = ? where path = ?', (identity or '', path))\n"
        "table.commit()\n"
    )
    time.sleep(0.1)
    subprocess.run([sys.executable, "-c", program], cwd=project.root, check=True)
    (project / "build/.noop_cache").unlink(missing_ok=True)


def test_a_signature_is_accepted_by_doit_and_by_the_tool_itself(project: Project, keys: Path) -> None:
    project.built()
    assert project.doit("sign", "--key", str(keys / "a.pem")).code == 0
    assert project.built().ran == [], "a signed model is up to date"
    assert project.doit("verify", "--key", str(keys / "a.pub")).code == 0
    run = project.doit("verify", "--key", str(keys / "b.pub"))
    assert (run.code, "the signature is not accepted" in run.out) == (1, True)
    command = [sys.executable, "-m", "model_signing", "verify", "key", PUBLISHED]
    command += ["--signature", f"{PUBLISHED}/model.sig", "--public_key", str(keys / "a.pub")]
    subprocess.run(command, cwd=project.root, check=True)
    with (project / "models/net/model.toml").open("a") as file:
        file.write('\n[card]\nlicense = "MIT"\n')
    assert project.built(REPOSITORY_SIGNING_KEY=str(keys / "b.pem")).ran == ["publish:net"]
    assert project.doit("verify", "--key", str(keys / "b.pub")).code == 0, "publishing with a key signs"
    run = project.doit("verify", "--key", str(keys / "none.pub"))
    assert (run.code, "there is no file" in run.out, "Traceback" in run.out) == (3, True, False)


def change(folder: Path, generator: random.Random) -> str:
    """Change a model's folder in one random way; returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = generator.choice(files)
    match generator.randrange(6):
        case 0:
            path.unlink()
        case 1:
            (path.parent / f"new{generator.random()}").write_bytes(b"x")
        case 2:
            path.write_bytes(path.read_bytes()[:-1] if path.stat().st_size else b"x")
        case 3:
            path.rename(path.with_name("renamed"))
        case 4:
            other = generator.choice(
                [each for each in files if each != path and each.read_bytes() != path.read_bytes()]
            )
            shutil.copy(other, path)
        case _:
            path.write_bytes(path.read_bytes() or b"xx")
            flip(path, generator.randrange(1 << 30))
    return str(path)


@pytest.mark.parametrize("count", [12, pytest.param(1000, marks=pytest.mark.long)])
def test_no_random_change_of_a_signed_model_is_missed(project: Project, keys: Path, count: int) -> None:
    signer, verifier = Identity(key=str(keys / "a.pem")), Identity(key=str(keys / "a.pub"))
    repository = project / "model_repository"
    signature.sign(f"{repository}/net", signer, f"{repository}/net/model.sig")
    assert signature.verify(f"{repository}/net", verifier) is None
    generator = random.Random(1)
    shutil.copytree(repository, project / "good")
    for _ in range(count):
        shutil.rmtree(repository)
        shutil.copytree(project / "good", repository)
        what = change(repository / "net", generator)
        by_manifest = check(str(repository), ["net"], read_files(files_of(str(repository), ["net"])))["net"]
        by_signature = signature.verify(f"{repository}/net", verifier)
        assert by_signature, what
        assert by_manifest or what.endswith("model.sig"), what


def test_a_push_to_a_folder_copies_what_differs(project: Project, tmp_path: Path) -> None:
    target = tmp_path / "served"
    url = f"file://{target}"
    assert "net: 6 files" in project.doit("push", url).out or (target / "net/SHA256SUMS").exists()
    assert project.tree("model_repository/net") == Project.tree(project, os.path.relpath(target / "net", project.root))
    assert "net: up to date" in project.doit("push", url).out
    assert project.doit("verify", url).code == 0
    flip(target / "net/1/model.pt", 500)
    run = project.doit("verify", url)
    assert (run.code, "net: changed: 1/model.pt" in run.out) == (1, True)
    (target / "net/SHA256SUMS").unlink()
    (target / "net/1/.draft-killed").write_text("x")
    project.doit("push", url)
    assert project.doit("verify", url).code == 0
    flip(project / PUBLISHED / "1/model.pt", 500)
    run = project.doit("push", f"file://{tmp_path}/other")
    assert (run.code, "doit verify --heal" in run.out) == (3, True)
    assert not (tmp_path / "other/net/config.pbtxt").exists()
    run = project.doit("push", "nothing://bucket")
    assert (run.code, "Traceback" in run.out) == (3, False)


def test_a_push_to_s3_can_be_verified_there(project: Project) -> None:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3() as environment:
        url = environment.pop("BUILD_CACHE").replace("/team", "/models")
        assert project.doit("push", url, **environment).code == 0
        assert "net: up to date" in project.doit("push", url, **environment).out
        assert project.doit("verify", url, **environment).code == 0


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.long)])
def test_a_killed_push_leaves_whole_models_and_the_next_one_completes(
    project: Project, tmp_path: Path, kills: int
) -> None:
    target, generator = tmp_path / "served", random.Random(kills)
    states = [project / "first", project / "second"]
    shutil.copytree(project / "model_repository", states[0])
    shutil.copytree(project / "model_repository", states[1])
    for name in ("config.pbtxt", "1/model.pt"):
        (states[1] / "net" / name).chmod(0o644)
        with (states[1] / "net" / name).open("ab") as file:
            file.write(b"# another version\n")
    write_manifest(str(states[1] / "net"))
    begin = time.monotonic()
    project.doit("push", f"file://{target}")
    duration = time.monotonic() - begin
    killed = 0
    for index in range(kills):
        state = states[index % 2]
        shutil.rmtree(project / "model_repository")
        shutil.copytree(state, project / "model_repository")
        process = project.start("push", f"file://{target}")
        time.sleep(generator.uniform(0.3, 1.0) * duration)
        process.kill()
        process.communicate()
        assert process.returncode in (0, -9)
        killed += process.returncode != 0
        if (target / "net/config.pbtxt").exists():
            there = {name: (target / "net" / name).read_bytes() for name in ("config.pbtxt", "1/model.pt")}
            assert there in [{name: (each / "net" / name).read_bytes() for name in there} for each in states]
        if (target / "net/SHA256SUMS").exists():
            assert check(str(target), ["net"], read_files(files_of(str(target), ["net"]))) == {"net": []}
    project.built("push", f"file://{target}")
    assert model_folders(str(target)) == ["net"]
    assert check(str(target), ["net"], read_files(files_of(str(target), ["net"]))) == {"net": []}
    assert killed


def test_an_image_layout_holds_the_models(project: Project, tmp_path: Path) -> None:
    layout = tmp_path / "image"
    first = project.doit("push", "--oci", str(layout)).out
    assert project.doit("push", "--oci", str(layout)).out == first, "the same models give the same digest"
    manifest = blob(layout, json.loads((layout / "index.json").read_text())["manifests"][0]["digest"])
    (layer,) = json.loads(manifest.read_text())["layers"]
    with tarfile.open(blob(layout, layer["digest"])) as archive:
        archive.extractall(tmp_path / "mounted", filter="data")
    served = tmp_path / "mounted/models"
    assert check(str(served), ["net"], read_files(files_of(str(served), ["net"]))) == {"net": []}
    if shutil.which("skopeo"):  # Debian's; in CI it may be absent
        command = ["skopeo", "--insecure-policy", "copy", f"oci:{layout}", f"dir:{tmp_path}/copied"]
        subprocess.run(command, check=True, capture_output=True)
    run = project.doit("push", "--oci", str(tmp_path))
    assert (run.code, "is not replaced" in run.out) == (3, True)


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def test_the_report_links_the_bill_of_materials(project: Project) -> None:
    pytest.importorskip("cyclonedx")
    assert project.doit("report").code == 0
    assert f'href="../{PUBLISHED}/1/bom.cdx.json"' in (project / "build/report.html").read_text()
