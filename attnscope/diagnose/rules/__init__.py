"""The rules, a file per family: what each looks at, why it matters, what to try."""
