"""Numbers of bytes and durations as text."""


def binary(n_bytes: float) -> str:
    """Returns a number of bytes in a suitable unit: 1023 B, 1.00 KiB, 1.28 TiB."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(n_bytes) >= 1024**power:
            return f"{n_bytes / 1024**power:,.2f} {unit}"
    return f"{n_bytes:,.0f} B"


def duration(seconds: float) -> str:
    """Returns h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
