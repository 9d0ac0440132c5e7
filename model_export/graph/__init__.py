"""What every exported graph is made of, whoever builds it."""
