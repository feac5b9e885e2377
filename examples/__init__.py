"""What fastprior loads beside itself, by path; installed as `fastprior_examples`."""
