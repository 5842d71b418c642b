"""The comparison of methods: which trainings are made, what is measured of each, and what follows."""
