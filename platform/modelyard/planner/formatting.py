"""Quantities as people read them: 1.2 B, 3.4 GiB, 2 h 10 min."""

from __future__ import annotations

_SCALES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def number(value: float | None) -> str:
    """1234567890 -> `1.23 B`; None -> `-`."""
    if value is None:
        return "-"
    for scale, letter in _SCALES:
        if abs(value) >= scale * 0.9995:
            return f"{value / scale:.3g} {letter}" if abs(value) < 999.5 * scale else f"{value / scale:.0f} {letter}"
    return f"{value:.3g}"


def flop(value: float | None) -> str:
    """5.1e15 -> `5.1 PFLOP`."""
    return "-" if value is None else (number(value).replace(" B", " G") + "FLOP").replace("  ", " ")


def size(value: float | None) -> str:
    """Bytes: 3650722201 -> `3.4 GiB`."""
    if value is None:
        return "-"
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            scaled = value / 1024**power
            return f"{scaled:.3g} {unit}" if scaled < 1000 else f"{scaled:.0f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds: 7800 -> `2 h 10 min`."""
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        rest = round(seconds - 60 * (seconds // 60))
        return f"{seconds // 60:.0f} min {rest} s" if seconds < 600 and 0 < rest < 60 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def money(usd: float | None) -> str:
    """US dollars: 1234.5 -> `$1,234`, 0.0123 -> `$0.012`."""
    if usd is None:
        return "-"
    if abs(usd) >= 100:
        return f"${usd:,.0f}"
    return f"${usd:.2f}" if abs(usd) >= 0.995 else f"${usd:.2g}"


def energy(kwh: float | None) -> str:
    """Kilowatt-hours: 0.0042 -> `4.2 Wh`, 5300 -> `5.3 MWh`."""
    if kwh is None:
        return "-"
    for scale, unit in ((1e3, "MWh"), (1.0, "kWh"), (1e-3, "Wh")):
        if kwh >= scale:
            return f"{kwh / scale:.3g} {unit}" if kwh < 1000 * scale else f"{kwh / scale:,.0f} {unit}"
    return f"{kwh * 1000:.2g} Wh"


def mass(kilograms: float | None) -> str:
    """Kilograms: 0.0042 -> `4.2 g`, 125000 -> `125 t`."""
    if kilograms is None:
        return "-"
    for scale, unit in ((1e3, "t"), (1.0, "kg")):
        if kilograms >= scale:
            return f"{kilograms / scale:.3g} {unit}" if kilograms < 1000 * scale else f"{kilograms / scale:,.0f} {unit}"
    return f"{kilograms * 1000:.2g} g"


def share(value: float | None) -> str:
    """0.473 -> `47.3 %`."""
    return "-" if value is None else f"{value * 100:.3g} %"
