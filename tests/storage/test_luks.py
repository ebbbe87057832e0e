"""Volumes that are encrypted with LUKS, as cryptsetup and QEMU make them: their bytes in clear, and what cannot be read."""

from __future__ import annotations

import dataclasses
import random
import shutil
import struct

import pytest

from hvmgr import errors
from hvmgr.host import cryptsetup, kept_secrets, process
from hvmgr.model.ranges import Ranges
from hvmgr.operations.inside import changed, looking, views
from hvmgr.operations.inside.unlocking import Key
from hvmgr.storage.filesystems import luks, opening, signatures, window
from hvmgr.storage.partitions import File
from tests.storage import encrypted, file_trees, test_lvm

MIB = 1 << 20
TEXT = b"a key of words"
ESSIV = ("cipher-alg=aes-256", "cipher-mode=cbc", "ivgen-alg=essiv", "ivgen-hash-alg=sha256")
LUKS1 = {"XTS": (), "CBC with ESSIV": ESSIV, "small keys": ("cipher-alg=aes-128", "cipher-mode=xts")}
LUKS2 = {
    "sectors of 512": ("--sector-size", "512"),
    "sectors of 4096": ("--sector-size", "4096"),
    "PBKDF2": ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, require_program):
    """A tree, and an ext4 that holds it."""
    for name in ("cryptsetup", "qemu-img", "mke2fs"):
        require_program(name)
    folder = tmp_path_factory.mktemp("plain")
    tree = folder / "tree"
    (tree / "etc").mkdir(parents=True)
    for size in (0, 1, 4095, 4097, 1 << 20):
        (tree / "etc" / f"size{size}").write_bytes(file_trees.pattern(size))
    return tree, file_trees.ext(folder / "ext4", tree, "-t", "ext4", "-b", "4096", size="6M")


def clear(disk, secret):
    header = luks.read_header(disk)
    key = luks.volume_key(disk, header, secret)
    return None if key is None else luks.Decrypted(disk, header, key)


def require_tree(image, secret, tree):
    with File(image) as disk:
        assert clear(disk, b"x" + secret) is None
        inside = clear(disk, secret)
        reader = opening.open_reader(signatures.recognise(inside).kind, inside)
        found = file_trees.of_reader(reader)
        require_same_when_encrypted(disk, inside)
    found.pop(b"lost+found")
    assert found == file_trees.of_host(tree)


def require_same_when_encrypted(disk, inside):
    """What stands there in clear is encrypted to the very bytes that cryptsetup, or QEMU, has put there."""
    chance = random.Random(1)
    for length in (inside.size, *(chance.randrange(1, 20_000) for _ in range(50))):
        offset = chance.randrange(inside.size - length + 1)
        data, wanted = bytearray(length), memoryview(bytearray(inside.size))
        inside.read_into(offset, memoryview(data))
        at, sectors = inside.encrypted(offset, memoryview(data))
        assert at <= inside.start + offset < at + len(sectors)
        disk.read_into(at, wanted[: len(sectors)])
        assert sectors == wanted[: len(sectors)]
    with pytest.raises(errors.Corrupt):
        inside.encrypted(inside.size - 1, memoryview(b"ab"))


@pytest.mark.parametrize("options", LUKS2.values(), ids=LUKS2)
def test_luks_2_shows_what_was_encrypted(plain, tmp_path, options):
    tree, image = plain
    secret = tmp_path / "image"
    shutil.copyfile(image, secret)
    encrypted.luks2(secret, encrypted.key_file(tmp_path), *options)
    require_tree(secret, encrypted.KEY, tree)


@pytest.mark.parametrize("options", LUKS1.values(), ids=LUKS1)
def test_luks_1_shows_what_was_encrypted(plain, tmp_path, options):
    tree, image = plain
    secret = encrypted.luks1(tmp_path / "image", image, encrypted.key_file(tmp_path, TEXT), *options)
    require_tree(secret, TEXT, tree)


def test_an_unknown_cipher_is_named(tmp_path):
    image = tmp_path / "image"
    head = struct.pack(">6sH32s32s32sII", b"LUKS\xba\xbe", 1, b"serpent", b"xts-plain64", b"sha256", 4096, 64)
    image.write_bytes(head.ljust(3 << 20, b"\0"))
    with looking.opened([views.of_image(image)], keys=[Key((TEXT,))]) as inside:
        assert looking.why_not(inside.volumes[0]) == "no reader here knows the cipher serpent-xts-plain64"


@pytest.fixture(scope="module")
def volume(plain, tmp_path_factory):
    """The ext4 as a LUKS 2 volume, on no disk of its own."""
    folder = tmp_path_factory.mktemp("volume")
    image = folder / "image"
    shutil.copyfile(plain[1], image)
    return encrypted.luks2(image, encrypted.key_file(folder))


def test_the_second_header_counts_where_the_first_is_torn(volume, plain, tmp_path):
    torn = tmp_path / "image"
    shutil.copyfile(volume, torn)
    with torn.open("r+b") as file:
        file.seek(5000)
        file.write(b"torn")
    require_tree(torn, encrypted.KEY, plain[0])
    with torn.open("r+b") as file:
        file.seek((16 << 10) + 5000)
        file.write(b"torn")
    with File(torn) as disk, pytest.raises(errors.Corrupt, match="both headers"):
        luks.read_header(disk)


def test_damaged_headers_are_errors_of_ours(volume, tmp_path):
    chance = random.Random(5)
    head = bytearray(volume.read_bytes()[: 1 << 20])
    for number in range(60):
        broken = bytearray(head)
        if number % 2:  # one that says nothing of its checksums
            broken[6:8], broken[72:72] = b"\0\1", b""
        for _ in range(20):
            broken[chance.randrange(4, 0x8000)] = chance.randrange(256)
        disk = test_lvm.Bytes(bytes(broken))
        with pytest.raises(errors.HvmgrError):
            luks.Decrypted(disk, luks.read_header(disk), bytes(64)).read_into(1 << 40, memoryview(bytearray(1)))


NONSENSE = {
    "a sector of no whole number": ("segments", {"sector_size": 512.0}),
    "a sector number before the first": ("segments", {"iv_tweak": "-1000000"}),
    "a size below nothing": ("segments", {"size": "-4096"}),
    "no size": ("segments", {"size": "0"}),
    "a part of a sector": ("segments", {"size": "4097"}),
    "a size of too many digits": ("segments", {"size": "1" * 400}),
    "an offset that is no text": ("segments", {"offset": 16777216}),
    "memory that is no number": ("keyslots", {"kdf": {"type": "argon2id", "time": 4, "memory": "4096"}}),
}


@pytest.mark.parametrize(("where", "change"), NONSENSE.values(), ids=NONSENSE)
def test_a_header_of_nonsense_is_damaged(volume, tmp_path, where, change):
    image = tmp_path / "image"
    image.write_bytes(volume.read_bytes()[: 17 << 20])
    encrypted.rewrite(image, lambda about: about[where]["0"].update(change))
    with File(image) as disk, pytest.raises(errors.Corrupt, match="the header of LUKS"):
        luks.read_header(disk)


DEAR = {
    "much memory": ({"memory": 8 << 20}, "each try of a key takes 8.0 GiB of memory"),
    "much time": ({"time": 1 << 30}, "each try of a key takes 1073741824 passes over 4.0 MiB"),
    "many iterations": ({"type": "pbkdf2", "hash": "sha256", "iterations": 1 << 31}, "takes 2147483648 iterations"),
}


@pytest.mark.parametrize(("change", "words"), DEAR.values(), ids=DEAR)
def test_a_key_that_takes_too_much_to_be_tried(volume, tmp_path, monkeypatch, change, words):
    image = tmp_path / "image"
    image.write_bytes(volume.read_bytes()[: 17 << 20])
    encrypted.rewrite(image, lambda about: about["keyslots"]["0"]["kdf"].update(change))
    monkeypatch.setattr(process, "_started", None)
    with File(image) as disk, pytest.raises(errors.Unsupported) as caught:
        clear(disk, encrypted.KEY)
    assert words in caught.value.message


def test_cryptsetup_has_the_memory_that_the_header_says(volume, tmp_path):
    """And no more, should it believe another copy of the header than we do."""
    image = tmp_path / "image"
    image.write_bytes(volume.read_bytes()[: 17 << 20])
    encrypted.rewrite(image, lambda about: about["keyslots"]["0"]["kdf"].update(memory=1 << 20))
    with File(image) as disk, pytest.raises(errors.Unsupported, match="had not enough memory to find its key"):
        little = dataclasses.replace(luks.read_header(disk), slots=luks.Slots(16 << 20, 4 << 20))
        luks.volume_key(disk, little, encrypted.KEY)


def test_a_header_that_cryptsetup_does_not_take_leaves_the_others_readable(volume, plain, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB) + plain[1].read_bytes() + bytes(MIB) + volume.read_bytes())
    start = (2 * MIB + plain[1].stat().st_size) // 512
    table = f"label: dos\nstart=2048,size={plain[1].stat().st_size // 512},type=83\nstart={start},type=83\n"
    file_trees.run("sfdisk", "-q", image, input=table.encode())
    part = tmp_path / "part"
    shutil.copyfile(volume, part)
    encrypted.rewrite(part, lambda about: about["digests"]["0"].update(keyslots=["7"]))
    with image.open("r+b") as file:
        file.seek(start * 512)
        file.write(part.read_bytes()[:0x8000])
    with looking.opened([views.of_image(image)], keys=[Key((encrypted.KEY,))]) as inside:
        assert "cryptsetup makes nothing of the header of LUKS" in looking.why_not(inside.volumes[1])
        assert inside.choose(b"/etc/size1").find(b"/etc/size1").size == 1


def test_a_header_with_a_hash_that_nobody_knows_is_passed_over(volume, plain, tmp_path):
    image = tmp_path / "image"
    shutil.copyfile(volume, image)
    with image.open("r+b") as file:
        file.seek(72)
        file.write(b"shake_128".ljust(32, b"\0"))
    require_tree(image, encrypted.KEY, plain[0])


def test_what_is_encrypted_may_begin_far_behind_its_header(volume, plain, tmp_path):
    image, far = tmp_path / "image", 300 << 20
    data = volume.read_bytes()
    with image.open("wb") as file:
        file.write(data[: 16 << 20])
        file.seek(far)
        file.write(data[16 << 20 :])
    encrypted.rewrite(image, lambda about: about["segments"]["0"].update(offset=str(far)))
    require_tree(image, encrypted.KEY, plain[0])
    encrypted.rewrite(image, lambda about: about["config"].update(keyslots_size=str(far - (32 << 10))))
    with File(image) as disk, pytest.raises(errors.Unsupported, match=r"the slots for keys take 300 MiB"):
        clear(disk, encrypted.KEY)


def test_a_volume_that_is_being_encrypted_is_refused(plain, tmp_path):
    image = tmp_path / "image"
    shutil.copyfile(plain[1], image)
    encrypted.luks2(image, encrypted.key_file(tmp_path), "--init-only")
    with File(image) as disk, pytest.raises(errors.Unsupported, match="online-reencrypt"):
        luks.read_header(disk)


def test_logical_volumes_inside_are_found(plain, tmp_path):
    """As Debian installs it: LVM in LUKS, and the key opens all of it."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("deep inside")
    part = file_trees.ext(tmp_path / "part", tree, "-t", "ext2", "-b", "1024", size="2M")
    image = tmp_path / "image"
    data = bytearray(test_lvm.physical(test_lvm.UUID, test_lvm.METADATA.encode()).data)
    data[2 << 20 : 4 << 20] = part.read_bytes()
    image.write_bytes(data)
    encrypted.luks2(image, encrypted.key_file(tmp_path))
    with looking.opened([views.of_image(image)], keys=[Key((encrypted.KEY,))]) as inside:
        logical = [one for one in inside.volumes if one.logical]
        assert [one.logical for one in logical] == ["group/whole", "group/torn", "group/thin"]
        assert all(one.encrypted for one in logical)  # what is written on top of it is kept in memory
        place = inside.place(logical[0])
        assert (place.start, place.size, place.lock.start) == (
            2 << 20,
            2 << 20,
            luks.read_header(place.lock.disk).start,
        )
        browser = inside.choose(b"/file")
        assert (browser.volume.logical, browser.find(b"/file").size) == ("group/whole", 11)


def test_a_whole_disk_that_is_encrypted_has_its_partitions(plain, tmp_path):
    """As QEMU and libvirt encrypt a disk: the table is inside."""
    disk, key = tmp_path / "disk", encrypted.key_file(tmp_path, TEXT)
    disk.write_bytes(bytes(1 << 20) + plain[1].read_bytes())
    file_trees.run("sfdisk", "-q", disk, input=b"label: dos\nstart=2048,type=83\n")
    secret = encrypted.luks1(tmp_path / "image", disk, key)
    with looking.opened([views.of_image(secret)], keys=[Key((TEXT,))], partition="1") as inside:
        (one,) = inside.volumes
        assert (one.number, one.kind, one.encrypted) == (1, signatures.Kind.EXT4, True)
        assert inside.choose(b"/etc/size4097").find(b"/etc/size4097").size == 4097


def test_a_key_is_found_once_as_long_as_all_that_it_follows_from_is_the_same(plain, tmp_path, monkeypatch):
    image = tmp_path / "image"
    shutil.copyfile(plain[1], image)
    key = encrypted.key_file(tmp_path)
    encrypted.luks2(image, key)
    kept_secrets._page.cache_clear()
    tried, real = [], cryptsetup.volume_key
    monkeypatch.setattr(
        cryptsetup, "volume_key", lambda *words, **more: (tried.append(words[1]), real(*words, **more))[1]
    )

    def found(secret):
        with File(image) as disk:
            return luks.volume_key(disk, luks.read_header(disk), secret)

    first = found(encrypted.KEY)
    assert [found(encrypted.KEY) for _ in range(3)] == [first] * 3
    assert len(first) == 64
    assert [found(b"wrong") for _ in range(3)] == [None] * 3
    assert tried == [encrypted.KEY, b"wrong"]
    header = image.read_bytes()[: 16 * MIB]
    places = [at for at in range(0x8000, len(header), 4096) if any(header[at : at + 4096])]
    with image.open("r+b") as file:  # the slot's own area: what is in it is no key any more
        for at in places:
            file.seek(at)
            file.write(bytes(4096))
    assert found(encrypted.KEY) is None
    with image.open("r+b") as file:
        file.write(header)
    other = encrypted.key_file(tmp_path, b"another")
    file_trees.run("cryptsetup", "luksChangeKey", "-q", *encrypted._CHEAP, "--key-file", key, image, other)
    assert (found(encrypted.KEY), found(b"another")) == (None, first)
    assert tried == [encrypted.KEY, b"wrong", encrypted.KEY, encrypted.KEY, b"another"]
    with image.open("r+b") as file:
        file.write(header)
    assert found(encrypted.KEY) == first
    assert len(tried) == 5


@pytest.mark.parametrize("cipher", ["aes-xts-plain64", "aes-cbc-essiv:sha256"])
def test_a_byte_that_was_written_decides_about_no_other_bytes_than_are_told(plain, tmp_path, cipher):
    image = tmp_path / "image"
    shutil.copyfile(plain[1], image)
    words = ("--cipher", cipher, "--key-size", "256", "--sector-size", "4096")
    encrypted.luks2(image, encrypted.key_file(tmp_path), *words)
    found, at = [], 16 * MIB + 3 * MIB + 511
    for _ in range(2):
        with File(image) as disk:
            inside = clear(disk, encrypted.KEY)
            data = bytearray(inside.size)
            inside.read_into(0, memoryview(data))
            parts = [("", one) for one in window.flattened(inside)]
        found.append(data)
        with image.open("r+b") as file:
            file.seek(at)
            file.write(b"\x55")
    told = changed.of_volume(parts, parts, {"": Ranges([(at, at + 1)])}, encrypted=True)
    differ = [place for place in range(3 * MIB - 8192, 3 * MIB + 8192) if found[0][place] != found[1][place]]
    assert differ
    assert found[0][: differ[0]] == found[1][: differ[0]]
    assert all(told.touch(place, place + 1) for place in differ)
    assert told.size <= 2 * 4096 + 1
