"""What is published proves itself: `doit verify`, `doit sign` and `doit push`."""

import datetime
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from doit.cmd_base import ModuleTaskLoader
from doit.exceptions import InvalidCommand
from fsspec.core import url_to_fs

from build_tasks.delivery import push
from build_tasks.delivery.push import DRAFT
from build_tasks.delivery.push_command import Push
from build_tasks.delivery.sign_command import Sign
from build_tasks.delivery.verify_command import Verify
from build_tasks.errors import UserError
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
    with open(os.fsencode(project / PUBLISHED) + b"/\xff\n", "w"):  # a name that is neither UTF-8 nor one line
        pass
    shutil.copytree(project / PUBLISHED, project / "model_repository/copy")
    run = project.doit("verify")
    assert run.code == 1
    for name in damaged:
        assert f"{name}: changed" in run.out
    assert re.search(f"^✗ {PUBLISHED}: (SHA256SUMS: |added: .udcff.n$)", run.out, re.MULTILINE), run.out
    assert "model_repository/copy was not generated here" in run.out, run.out
    os.unlink(os.fsencode(project / PUBLISHED) + b"/\xff\n")
    shutil.rmtree(project / "model_repository/copy")
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


def make_certificates(folder: Path) -> None:
    """Write the key of a signer, its certificate, and the certificate of the authority that issued it."""
    x509 = importlib.import_module("cryptography.x509")
    hashes = importlib.import_module("cryptography.hazmat.primitives.hashes")
    ec = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ec")
    serialization = importlib.import_module("cryptography.hazmat.primitives.serialization")
    now, keys = datetime.datetime.now(datetime.UTC), {}
    for name, issuer in (("ca", "ca"), ("signer", "ca"), ("other-ca", "other-ca")):
        key = keys[name] = ec.generate_private_key(ec.SECP256R1())
        other_uses = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign")
        unused = dict.fromkeys((*other_uses, "encipher_only", "decipher_only"), False)
        usage = x509.KeyUsage(digital_signature=True, key_cert_sign=name == issuer, **unused)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .sign(keys[issuer], hashes.SHA256())
        )
        (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / f"{name}.key").write_bytes(key.private_bytes(*private))


def test_a_certificate_is_accepted_by_doit_and_by_the_tool_itself(project: Project, keys: Path) -> None:
    make_certificates(keys)
    certified = ("--key", f"{keys}/signer.key", "--certificate", f"{keys}/signer.crt", "--chain", f"{keys}/ca.crt")
    run = project.doit("sign", *certified)
    assert run.code == 0, run.out
    assert project.doit("verify", "--chain", f"{keys}/ca.crt").code == 0
    run = project.doit("verify", "--chain", f"{keys}/other-ca.crt")
    assert (run.code, "the signature is not accepted" in run.out) == (1, True)
    command = [sys.executable, "-m", "model_signing", "verify", "certificate", PUBLISHED]
    command += ["--signature", f"{PUBLISHED}/model.sig", "--certificate_chain", f"{keys}/ca.crt"]
    subprocess.run(command, cwd=project.root, check=True)
    folder = str(project / PUBLISHED)
    assert signature.verify(folder, Identity(key=f"{keys}/a.pub")), "a key does not accept what a certificate signed"
    (project / PUBLISHED / "config.pbtxt").write_text("")
    reason = signature.verify(folder, Identity(chain=(f"{keys}/ca.crt",)))
    assert reason == "the signature is not accepted: Signature mismatch: ['config.pbtxt has changed']"
    with pytest.raises(UserError, match=r"cannot sign with .*a\.pem, .*signer\.crt"):
        signature.sign(folder, Identity(key=f"{keys}/a.pem", certificate=f"{keys}/signer.crt"), f"{folder}/model.sig")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sign", "expected either --key or --keyless"),
        ("sign --keyless --certificate c.pem", "expected --certificate with --key"),
        ("sign --key k.pem --chain c.pem", "--chain with --certificate"),
        ("verify --key k.pub --chain c.pem", "expected only one of --key, --chain and --identity"),
        ("verify --identity me@example.com", "expected --identity and --issuer together"),
        ("push /srv/models", "expected a URL"),
        ("push file://srv/models", "expected an absolute path such as file:///srv/models"),
        ("push file://{root}/model_repository/more", "is in model_repository/ of this checkout"),
        ("push --oci model_repository/image", "is in model_repository/ of this checkout"),
        ("push typo://bucket", "Protocol not known"),
        ("push file://{root}/model_repository.txt/x", "Not a directory"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    original: Project, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(original.root)
    (original / "model_repository.txt").touch()
    command, *arguments = words.format(root=original.root).split()
    commands = {"sign": Sign(), "verify": Verify(task_loader=ModuleTaskLoader({})), "push": Push()}
    with pytest.raises(InvalidCommand) as caught:
        commands[command].parse_execute(arguments)
    (line,) = str(caught.value).splitlines()
    assert message in line


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


@pytest.mark.parametrize(
    ("pushed", "files", "stranger"),
    [
        pytest.param(False, {"net/config.pbtxt": "name: 'net'", "net/1/model.pt": "x"}, "config.pbtxt", id="by hand"),
        pytest.param(False, {"net/1/model.onnx": "x"}, "1/model.onnx", id="by hand, without config.pbtxt"),
        pytest.param(True, {"net/7/model.pt": "x"}, "7/model.pt", id="another version"),
        pytest.param(True, {"net/notes.txt": "x"}, "notes.txt", id="notes"),
        pytest.param(True, {"other/config.pbtxt": "x"}, None, id="another model"),
        pytest.param(True, {"net/config.pbtxt": "damaged"}, None, id="damage"),
        pytest.param(False, {"net/1/provenance.json": "{}", "net/1/model.pt": "x"}, None, id="of a killed push"),
        pytest.param(False, {"net/1/.draft-1-provenance.json": "{"}, None, id="draft of a killed push"),
    ],
)
def test_a_push_replaces_only_what_a_push_has_written(
    original: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pushed: bool,
    files: dict[str, str],
    stranger: str | None,
) -> None:
    monkeypatch.chdir(original.root)
    url = f"file://{tmp_path}"
    if pushed:
        push.push(url, ["net"], print)
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    if stranger:
        with pytest.raises(UserError, match=f"net/{stranger} was not copied there by `doit push`, and is not replaced"):
            push.push(url, ["net"], print)
        assert {path: (tmp_path / path).read_text() for path in files} == files
    else:
        if pushed and "net/config.pbtxt" in files:  # the next push believes the manifest there
            assert push.verify(url, ["net"]) == {"net": ["net: changed: config.pbtxt"]}
            (tmp_path / "net/SHA256SUMS").unlink()
            (tmp_path / "net/config.pbtxt").unlink()
        push.push(url, ["net"], print)
        assert push.verify(url, ["net"]) == {"net": []}


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


def test_a_push_to_s3_can_be_verified_there(project: Project) -> None:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3() as environment:
        url = environment.pop("BUILD_CACHE").replace("/team", "/models")
        assert project.doit("push", url, **environment).code == 0
        assert "net: up to date" in project.doit("push", url, **environment).out
        assert project.doit("verify", url, **environment).code == 0


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The URL of an empty destination, and the environment variables with which doit reaches it."""
    if request.param == "folder":
        yield f"file://{tmp_path}/served", {}
        return
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3() as environment:
        yield environment.pop("BUILD_CACHE").replace("/team", "/models"), environment


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.long)])
def test_a_killed_push_leaves_whole_models_and_the_next_one_completes(
    project: Project,
    tmp_path: Path,
    place: tuple[str, dict[str, str]],
    kills: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (url, environment), generator = place, random.Random(kills)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    states = [project / "first", project / "second"]
    for state in states:
        shutil.copytree(project / "model_repository", state)
    # The files are so large in the long form that most kills hit the copying, and not the start of doit.
    for version, state in enumerate(states):
        for name, more in (("config.pbtxt", b"#\n" * version), ("1/model.pt", generator.randbytes(kills << 19))):
            (state / "net" / name).chmod(0o644)
            with (state / "net" / name).open("ab") as file:
                file.write(more)
        write_manifest(str(state / "net"))

    def fetch(index: int) -> Path:
        """A copy of what is there, without drafts, which Triton does not read."""
        copy = tmp_path / f"there-{index}"
        files, root = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
        (copy / "net").mkdir(parents=True)
        for path in files.find(root):
            if not path.rpartition("/")[2].startswith(DRAFT):
                target = copy / path.removeprefix(root).lstrip("/")
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(files.cat_file(path))
        return copy

    def publish(state: Path) -> None:
        shutil.rmtree(project / "model_repository")
        shutil.copytree(state, project / "model_repository")

    publish(states[0])
    begin = time.monotonic()
    project.built("push", url, **environment)
    duration = time.monotonic() - begin
    counts: Counter[str] = Counter()
    for index in range(kills):
        publish(states[(index + 1) % 2])
        process = project.start("push", url, **environment)
        time.sleep(generator.uniform(0.3, 1.0) * duration)
        process.kill()
        process.communicate()
        assert process.returncode in (0, -9)
        counts["killed"] += process.returncode != 0
        there = fetch(index)
        if (there / "net/config.pbtxt").exists():
            found = {name: (there / "net" / name).read_bytes() for name in ("config.pbtxt", "1/model.pt")}
            assert found in [{name: (each / "net" / name).read_bytes() for name in found} for each in states]
        if (there / "net/SHA256SUMS").exists():
            assert check(str(there), ["net"], read_files(files_of(str(there), ["net"]))) == {"net": []}
            counts["complete"] += 1
        shutil.rmtree(there)
    project.built("push", url, **environment)
    there = fetch(kills)
    assert model_folders(str(there)) == ["net"]
    assert project.doit("verify", url, **environment).code == 0
    assert check(str(there), ["net"], read_files(files_of(str(there), ["net"]))) == {"net": []}
    assert counts["killed"]
    print(f"{url}: {kills} pushes, {dict(counts)}")


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


def test_builds_in_two_folders_give_equal_records(original: Project, tmp_path: Path) -> None:
    """Nothing of the checkout's path, nor of the parent's, is in a statement, a bill of materials or a manifest."""
    other = Project(tmp_path / "Another team é" / "triton models")
    other.model("net", OTHER)
    other.built(LANG="C", TZ="Asia/Tokyo", PYTHONHASHSEED="7")
    for name in ("1/provenance.json", "1/bom.cdx.json", "SHA256SUMS"):
        text = (other / PUBLISHED / name).read_bytes()
        assert text == (original / PUBLISHED / name).read_bytes(), name
        assert str(tmp_path).encode() not in text


def test_the_report_links_the_bill_of_materials(project: Project) -> None:
    pytest.importorskip("cyclonedx")
    assert project.doit("report").code == 0
    assert f'href="../{PUBLISHED}/1/bom.cdx.json"' in (project / "build/report.html").read_text()
