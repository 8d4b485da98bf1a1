"""One file a verb: ``deepseek-jax train`` runs ``main(argv)`` of ``train.py``; a leading _ marks what is no verb."""
