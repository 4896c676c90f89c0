"""ICC profiles, made from the definition of their colour spaces."""

import struct

D50 = (0.9642, 1.0, 0.8249)
# X, Y, Z of red, green and blue, adapted to D50
PRIMARIES = {
    "P3": ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)),
    "Adobe": ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)),
}


def icc_profile(space, tags, gamma):
    """A display profile, version 2, with one gamma for all channels; tags: X, Y, Z by name."""
    entries = {name: b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * x) for x in xyz)) for name, xyz in tags}
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma)) + bytes(2)
    entries |= dict.fromkeys(("kTRC",) if space == "GRAY" else ("rTRC", "gTRC", "bTRC"), curve)
    text = b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78)
    entries |= {"desc": text + bytes(-len(text) % 4), "cprt": b"text" + bytes(4) + b"none"}
    table = struct.pack(">I", len(entries))
    data = b""
    for name, entry in entries.items():
        table += name.encode() + struct.pack(">II", 132 + 12 * len(entries) + len(data), len(entry))
        data += entry
    body = table + data
    header = struct.pack(">I4xI", 128 + len(body), 0x02400000) + b"mntr" + space.ljust(4).encode() + b"XYZ "
    header = header.ljust(36, b"\0") + b"acsp"
    header = header.ljust(68, b"\0") + struct.pack(">3i", *(round(65536 * x) for x in D50))
    return header.ljust(128, b"\0") + body


def rgb_profile(name):
    tags = zip(("rXYZ", "gXYZ", "bXYZ"), PRIMARIES[name], strict=True)
    return icc_profile("RGB", [("wtpt", D50), *tags], 2.2)
