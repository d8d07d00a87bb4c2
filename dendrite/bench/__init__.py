"""The benchmark suite that ships with the package: each case a function from settings to a `Result`."""
