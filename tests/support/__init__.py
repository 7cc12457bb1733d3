"""Helpers that the tests share: servers, clients, pictures and predictors. No test module imports from another one."""
