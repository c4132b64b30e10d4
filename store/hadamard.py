"""Hadamard matrices: square, entries +1 and -1, rows orthogonal to each other."""

import math

import numpy as np
from numpy.typing import NDArray


def hadamard(order: int) -> NDArray[np.float64] | None:
    """Return a Hadamard matrix (order, order), None where the constructions here give none.

    Sylvester's doubling (1867) of the matrices that Paley (1933, "On orthogonal matrices") built
    from the squares modulo a prime. Of the orders that networks have it gives powers of two, 24,
    40, 48, 80, 96, 112, 160, 192, 320, 384, 768, 1152, 1280, 1408; not 52, 92, 100 and other rare
    multiples of four, which take a prime power or a computer search. No other order above 2 has one.
    """
    if order == 1:
        return np.ones((1, 1))
    half = hadamard(order // 2) if order % 2 == 0 else None
    if half is not None:
        return np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), half)
    if order % 4:
        return None
    if _is_prime(order - 1):  # which is 3 modulo 4: Paley's first construction
        return np.eye(order) + _conference(order - 1)
    if order // 2 % 4 == 2 and _is_prime(order // 2 - 1):  # 1 modulo 4: the second
        cross = np.array([[1.0, 1.0], [1.0, -1.0]])
        diagonal = np.array([[1.0, -1.0], [-1.0, -1.0]])
        return np.kron(_conference(order // 2 - 1), cross) + np.kron(np.eye(order // 2), diagonal)
    return None


def _conference(prime: int) -> NDArray[np.float64]:
    """Return Paley's matrix of order prime + 1: zeros on the diagonal, rows orthogonal."""
    character = np.full(prime, -1.0)
    character[np.arange(prime) ** 2 % prime] = 1.0
    character[0] = 0.0
    steps = np.arange(prime)
    matrix = np.zeros((prime + 1, prime + 1))
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = 1.0 if prime % 4 == 1 else -1.0
    matrix[1:, 1:] = character[(steps[:, None] - steps) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
