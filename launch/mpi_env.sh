# shellcheck shell=sh
# Sourced by the launch scripts: what Open MPI needs to run anywhere. Settings that are there already are kept.

# Containers run as root, and Open MPI refuses root unless told twice.
if [ "$(id -u)" -eq 0 ]; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
# More ranks than cores is slow but right.
export OMPI_MCA_rmaps_base_oversubscribe="${OMPI_MCA_rmaps_base_oversubscribe:-1}"
# One or two ranks would be bound to one core each, whatever threads they have.
export OMPI_MCA_hwloc_base_binding_policy="${OMPI_MCA_hwloc_base_binding_policy:-none}"
# A failing rank says in one line what is wrong; mpirun's own banner would bury it.
export OMPI_MCA_orte_execute_quiet="${OMPI_MCA_orte_execute_quiet:-1}"
# Containers forbid reading another process's memory, which Open MPI would try and complain about.
export OMPI_MCA_btl_vader_single_copy_mechanism="${OMPI_MCA_btl_vader_single_copy_mechanism:-none}"
