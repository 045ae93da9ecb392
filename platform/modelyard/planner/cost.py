"""Money, energy and carbon of device-hours: on demand, spot with its restarts, kWh by PUE, CO2e by grid."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from modelyard.errors import RecipeError
from modelyard.planner.hardware import Hardware, load_table
from modelyard.planner.time import check_positive


@dataclass(frozen=True)
class Cost:
    """What a number of device-hours costs.

    Attributes:
        device_hours: devices x hours of work, without restarts.
        on_demand_usd: at the on-demand price; None without a price.
        spot_usd: at the spot price, with the hours that interruptions repeat; None without a price, or where
            so many nodes are interrupted that the job would never end.
        spot_hours: wall hours on spot capacity; None where the job would never end.
        kwh: electricity, cooling included by PUE.
        co2e_kg: emissions of that electricity on the region's grid.
    """

    device_hours: float
    on_demand_usd: float | None
    spot_usd: float | None
    spot_hours: float | None
    kwh: float
    co2e_kg: float


def price(hw: Hardware, spot: bool = False, path: str | None = None) -> float | None:
    """USD an hour of one device; None for a device without a price. `path`: a YAML file merged over the table."""
    row = load_table("prices", path)["devices"].get("cpu-core" if hw.kind == "cpu" else hw.name)
    if row is None:
        return None
    cores = max(hw.cores, 1) if hw.kind == "cpu" else 1
    return float(row["spot" if spot else "on_demand"]) * cores


def carbon_intensity(region: str, path: str | None = None) -> float:
    """Grams of CO2e a kWh of a region's grid.

    Raises:
        RecipeError: unknown region; names the nearest known one.
    """
    table = load_table("regions", path)["regions"]
    key = region.strip().lower().replace(" ", "-").replace("_", "-")
    if key not in table:
        near = difflib.get_close_matches(key, table, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(f"unknown grid region {region!r}", place="region", mend=hint + "known: " + ", ".join(table))
    return float(table[key])


def spot_overhead(
    devices: int, node: int, checkpoint_minutes: float = 30.0, restart_minutes: float | None = None,
    interruptions_per_day: float | None = None,
) -> float:  # fmt: skip
    """Wall time on spot capacity over time without interruptions, at least 1.

    Each of the job's nodes is taken away `interruptions_per_day` times; each time the job repeats half
    a checkpoint interval and waits for the restart. Raises RecipeError when the job would never end.
    """
    table = load_table("prices")
    restart = restart_minutes if restart_minutes is not None else float(table["spot_restart_minutes"])
    rate = interruptions_per_day if interruptions_per_day is not None else float(table["spot_interruptions_per_day"])
    nodes = max(-(-devices // node), 1)
    lost = nodes * rate * (checkpoint_minutes / 2 + restart) / (24 * 60)
    if lost >= 1:
        raise RecipeError(
            f"{nodes} spot nodes lose {lost:.0%} of their time to interruptions: the job would never end",
            place="spot",
            mend="checkpoint more often, use fewer nodes or on-demand capacity",
        )
    return 1 / (1 - lost)


def _stretch(devices: int, node: int, checkpoint_minutes: float) -> float | None:
    try:
        return spot_overhead(devices, node, checkpoint_minutes)
    except RecipeError:
        return None  # on-demand figures are wanted all the same


def cost(
    hours: float, devices: int, hw: Hardware, *, region: str = "world", pue: float | None = None,
    utilisation: float = 0.9, prices: str | None = None, checkpoint_minutes: float = 30.0,
) -> Cost:  # fmt: skip
    """Costs of `hours` on `devices`.

    Args:
        hours: wall hours without interruptions.
        devices: number of devices.
        hw: the device.
        region: grid region of `data/regions.yaml`.
        pue: power usage effectiveness of the data centre; None = the table's.
        utilisation: mean power over the rated power.
        prices: YAML file merged over the price table.
        checkpoint_minutes: what an interruption can lose.

    Raises:
        RecipeError: non-positive hours or devices, unknown region.
    """
    check_positive(hours=hours, devices=devices)
    factor = pue if pue is not None else float(load_table("regions")["pue"])
    stretch = _stretch(devices, hw.node, checkpoint_minutes)
    device_hours = hours * devices
    demand, spot = price(hw, False, prices), price(hw, True, prices)
    kwh = device_hours * hw.watts * utilisation * factor / 1000
    return Cost(
        device_hours=device_hours, on_demand_usd=None if demand is None else demand * device_hours,
        spot_usd=None if spot is None or stretch is None else spot * device_hours * stretch,
        spot_hours=None if stretch is None else hours * stretch,
        kwh=kwh, co2e_kg=kwh * carbon_intensity(region) / 1000,
    )  # fmt: skip
