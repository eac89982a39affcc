"""Chaos: real servers, real client processes, a seeded nemesis, and a checker that judges from the clients' ledgers."""
