"""Addresses that no delivery may reach, and the ways in which people write them so that a careless parser does."""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

# fmt: off
ADDRESSES = (
    "169.254.169.254", "10.0.0.1", "fd00:ec2::254",  # the sentinels'
    "0.0.0.0", "0.1.2.3", "10.255.255.254", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
    "168.63.129.16", "169.254.170.2", "172.16.0.1", "172.31.255.254", "192.0.0.1", "192.0.0.192", "192.0.2.1",
    "192.88.99.1", "192.168.0.1", "192.168.255.254", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "::", "::1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "100::1", "2001::1",
    "2001:db8::1", "2002:a9fe:a9fe::", "3fff::1", "5f00::1", "fc00::1", "fe80::1", "fec0::1", "ff02::1",
)
# fmt: on
DOTS = ("\u3002", "\uff0e", "\uff61")  # which IDNA reads as one


def spellings(address: str) -> list[str]:
    """What may stand between the scheme and the path of a URL."""
    ip = ip_address(address)
    hosts = _of_v4(ip) if isinstance(ip, IPv4Address) else _of_v6(ip)
    return list(dict.fromkeys((*hosts, *_of_url(f"[{ip}]" if ip.version == 6 else str(ip)))))


def _of_url(host: str) -> Iterator[str]:
    """Where parsers differ about which part of a URL is the host."""
    yield f"user@{host}"
    yield f"user:password@{host}"
    yield f"public.example@{host}"
    yield f"public.example:443@{host}"
    yield f"{host}#@public.example"
    yield f"{host}\\@public.example"
    yield f"public.example\\@{host}"
    yield f"public.example#@{host}"
    yield f"{host}\r\nhost: public.example"
    yield f"{host}\t"
    yield f"{host} "
    yield f"{host}\0.public.example"
    yield f"{host}%00.public.example"
    yield f"{host}:443:443"
    yield f"/{host}"


def _of_v4(ip: IPv4Address) -> Iterator[str]:
    a, b, c, d = ip.packed
    number, dotted = int(ip), str(ip)
    yield dotted
    yield f"{dotted}."
    yield f"{number}"
    yield f"{number + (1 << 32)}"
    yield f"0x{number:08x}"
    yield f"0X{number:08X}"
    yield f"0{number:o}"
    yield ".".join(f"0x{part:x}" for part in ip.packed)
    yield ".".join(f"0{part:o}" for part in ip.packed)
    yield ".".join(f"{part:03}" for part in ip.packed)
    yield ".".join(f"{part + 256}" for part in ip.packed)
    yield f"{a}.{b}.{c << 8 | d}"
    yield f"{a}.{b << 16 | c << 8 | d}"
    yield f"0x{a:x}.0{b:o}.{c}.{d}"
    yield "".join(chr(0xFF10 + int(sign)) if sign.isdigit() else sign for sign in dotted)  # full width
    yield "".join(f"%{ord(sign):02x}" for sign in dotted)
    for dot in DOTS:
        yield dotted.replace(".", dot)
    yield f"[{dotted}]"
    yield f"[::ffff:{dotted}]"
    yield f"[::ffff:{a << 8 | b:x}:{c << 8 | d:x}]"
    yield f"[0:0:0:0:0:FFFF:{dotted}]"
    yield f"[::{dotted}]"
    yield f"[64:ff9b::{dotted}]"
    yield f"[2002:{a << 8 | b:x}:{c << 8 | d:x}::]"
    yield f"[::ffff:{dotted}%25lo]"


def _of_v6(ip: IPv6Address) -> Iterator[str]:
    text, parts = str(ip), ip.exploded.split(":")
    yield f"[{text}]"
    yield f"[{ip.exploded}]"
    yield f"[{text.upper()}]"
    yield f"[{':'.join(f'{int(part, 16):x}' for part in parts)}]"
    yield f"[{':'.join(parts[:6])}:{IPv4Address(int(ip) & 0xFFFFFFFF)}]"
    yield f"[{text}%25lo]"
    yield f"[{text}%lo]"
    yield f"[{text}]."
    yield f"[{text}"
    yield text
    yield f"[[{text}]]"
    yield f"[v6.{text}]"
    yield f"[0x{int(ip):x}]"
    yield f"[{text.replace(':', '%3a')}]"
    yield f"%5b{text}%5d"
    yield f"[{text}]:443@public.example"
    yield text.replace(":", "-") + ".ip6-literal.net@" + f"[{text}]"
