"""Randomness that belongs to a branch: a 64-bit key each, and one uniform number per (key, position).

    root_key(salt) ─ key ──┬── child_key(key, 0) ──┬── child_key(…, 0)
                           │                       └── …
                           └── child_key(key, 1)        uniform(key, 17): the draw of the token at position 17

Nothing here has state, so the company in a batch, the order of calls and a restart change no draw. The mixing function
is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
with David Stafford's thirteenth set of constants).
"""

from __future__ import annotations

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB

# Roots, children and draws hash from different starts, so that a draw never equals bits of a key.
_ROOT_DOMAIN = 0x726F6F74
_CHILD_DOMAIN = 0x6368696C64


def mix(value: int) -> int:
    """SplitMix64's finaliser: a bijection of the 64-bit integers in which every input bit moves every output bit."""
    value &= MASK
    value = ((value ^ (value >> 30)) * MULTIPLIER_1) & MASK
    value = ((value ^ (value >> 27)) * MULTIPLIER_2) & MASK
    return value ^ (value >> 31)


def root_key(salt: int) -> int:
    """The 64-bit key of a root; `salt` is a seed or a counter, any integer (taken modulo 2**64)."""
    return mix(mix(_ROOT_DOMAIN) + salt * GOLDEN)


def child_key(parent_key: int, index: int) -> int:
    """The key of a branch's child number `index` (0 or more), in constant time at any depth."""
    return mix(mix(parent_key ^ _CHILD_DOMAIN) + (index + 1) * GOLDEN)


def uniform(key: int, position: int) -> float:
    """The number in [0, 1) that draws the token at absolute `position` of the branch with this key; 53 random bits."""
    return (mix(key + (position + 1) * GOLDEN) >> 11) * 2.0**-53
