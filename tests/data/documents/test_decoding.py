"""Bytes to text: likely text wins, by the web's rules, and a guess is said."""

from __future__ import annotations

import pytest

from cartridge_distill.data.documents.decoding import decode
from cartridge_distill.util.errors import DocumentError

TEXTS = {
    "Die Brücke über den Fluß ist länger, als die Behörde gewünscht hätte.": (
        *("cp1252", "iso8859_15", "mac_roman", "cp1250"),
    ),
    "L'été dernier, l'élève a été reçu à l'école où son père était né.": ("cp1252", "mac_roman"),
    "El niño comió la manzana; ¿cuándo volverá mañana?": ("cp1252",),
    "Wczoraj poszliśmy na długi spacer wzdłuż rzeki, która płynie przez miasto.": (
        *("cp1250", "iso8859_2"),
    ),
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Šli jsme podél řeky.": ("cp1250", "iso8859_2"),
    "Мост через реку открыт. Он длиннее, чем хотели власти.": (
        *("cp1251", "koi8_r", "iso8859_5", "cp866"),
    ),
    "Η γέφυρα πάνω από το ποτάμι είναι ανοιχτή για όλους.": ("cp1253", "iso8859_7"),
    "Köprü nehrin üzerinde açıldı; şehir halkı çok sevindi.": ("cp1254",),
    "这座桥横跨河流，比当局希望的要长。": ("gb18030", "gbk"),
    "這座橋橫跨河流，比當局希望的要長。": ("big5",),
    "橋は川の上にかかっている。とても長いです。": ("shift_jis", "euc_jp", "iso2022_jp"),
    "다리는 강 위에 있다. 우리는 어제 저녁에 산책을 했다.": ("euc_kr",),
    "สะพานข้ามแม่น้ำเปิดแล้ว": ("cp874",),
    "הגשר מעל הנהר פתוח לכולם": ("cp1255",),
    "الجسر فوق النهر مفتوح للجميع": ("cp1256",),
    "Brücke": ("cp1252",),
    "100 °C ± 5": ("cp1252",),
    "façade – «rôle» à 5 €": ("cp1252",),
}


@pytest.mark.parametrize(
    ("text", "encoding"), [(text, name) for text, names in TEXTS.items() for name in names]
)
def test_an_undeclared_text_is_read_as_what_is_likeliest(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding), "a.txt").text == text


@pytest.mark.parametrize(
    ("text", "encoding", "declared", "said"),
    [
        ("Grüße", "utf-8", "utf-16", ""),
        ("Grüße", "utf-8", "latin-1", ""),
        ("Grüße", "utf-8", "shift_jis", ""),
        ("„Grüße“ – ‚so‘", "cp1252", "iso-8859-1", ""),  # the web's name for windows-1252
        ("Мост открыт.", "koi8_r", "koi8-r", ""),
        ("这座桥", "gbk", "gb2312", ""),
        ("橋は川", "shift_jis", "x-sjis", ""),
        ("다리는", "euc_kr", "ks_c_5601-1987", ""),
        ("Мост через реку открыт.", "cp1251", "koi8-r", "says that it is koi8-r"),
        ("Die Brücke über den Fluß", "cp1252", "utf-8", "says that it is utf-8"),
        ("Die Brücke über den Fluß", "cp1252", "no-such-encoding", "a guess"),
        ("Grüße, UTF-16 ohne Marke", "utf-16-le", None, ""),
        ("Grüße, UTF-16 ohne Marke", "utf-16-be", None, ""),
    ],
)
def test_what_is_declared_is_no_proof(
    text: str, encoding: str, declared: str | None, said: str
) -> None:
    found = decode(text.encode(encoding), "a.html", declared)
    assert found.text == text
    assert said in found.note and bool(said) == bool(found.note)


def test_few_bad_bytes_in_utf8_are_said_and_do_not_make_another_encoding() -> None:
    found = decode("Grüße aus Århus. ".encode() * 20 + b"\xff\xfe", "a.txt")
    assert found.text.startswith("Grüße aus Århus. Grüße") and found.encoding == "utf-8"
    assert "2 bytes of it are no UTF-8" in found.note


def test_what_a_terminal_shows_becomes_letters() -> None:
    page = "N\x08NA\x08AM\x08ME\x08E\n  _\x08l_\x08s - \x1b[1mlist\x1b[0m\n"
    assert decode(page.encode(), "ls.txt").text == "NAME\n  ls - list\n"


@pytest.mark.parametrize("data", [bytes(range(256)) * 4, b"\x00\x01\x02\x03", b"ab\x00cd\x00\x00"])
def test_what_is_no_text_is_refused(data: bytes) -> None:
    with pytest.raises(DocumentError, match="a.txt is a binary file or in an unknown encoding"):
        decode(data, "a.txt")
