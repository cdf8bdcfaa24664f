#include "comm/checks.h"
#include "comm/communicator.h"

namespace comm {
namespace {

class LocalCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void all_reduce(Tensor t, Reduce) override { check_reducible("all_reduce", t); }
  std::unique_ptr<Request> all_reduce_async(Tensor t, Reduce) override {
    check_reducible("all_reduce", t);
    return std::make_unique<DoneRequest>();
  }
  std::unique_ptr<Request> reduce_scatter_async(Tensor t, Reduce op) override {
    check_stripes("reduce_scatter", t, 1);
    return all_reduce_async(t, op);
  }
  void broadcast(Tensor t, int root) override {
    check_dense("broadcast", t);
    check_root("broadcast", root, 1);
  }
  void transfer(Tensor t, int from, int to) override {
    check_dense("transfer", t);
    check_root("transfer", from, 1);
    check_root("transfer", to, 1);
  }
  std::unique_ptr<Request> all_gather_async(Tensor t) override {
    check_stripes("all_gather", t, 1);
    return std::make_unique<DoneRequest>();
  }
  void barrier() override {}
};

}  // namespace

std::unique_ptr<Communicator> make_local_communicator() { return std::make_unique<LocalCommunicator>(); }

}  // namespace comm
