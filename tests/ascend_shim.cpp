// Lets MindSpore's auto-parallel front end run on a machine without cards: an "Ascend" device whose initialisation does
// nothing, and a communication manager that knows ranks from the environment and never communicates.
//
// The declarations repeat MindSpore's own binary interface (old std::string ABI); only what is used here is declared.
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace mindspore {
class MsContext {
 public:
  static void RegisterInitFunc(const std::string &device, void (*initialise)(MsContext *));
};

class CommManager {
 public:
  static bool Register(const std::string &name, const std::shared_ptr<CommManager> &instance);
  virtual ~CommManager() = default;
  virtual bool CreateGroupSync(const std::string &group, const std::vector<unsigned int> &ranks) const = 0;
  virtual bool DestroyGroup(const std::string &group) const = 0;
  virtual bool GetRankID(const std::string &group, unsigned int *rank) const = 0;
  virtual bool GetRankSize(const std::string &group, unsigned int *ranks) const = 0;
  virtual uint32_t GetRank() = 0;

 protected:
  explicit CommManager(std::string backend) : backend_(std::move(backend)) {}
  std::string backend_;
};
}  // namespace mindspore

namespace {
unsigned int FromEnvironment(const char *name, unsigned int otherwise) {
  const char *text = std::getenv(name);
  return text == nullptr ? otherwise : static_cast<unsigned int>(std::atoi(text));
}

class Pretended : public mindspore::CommManager {
 public:
  explicit Pretended(const std::string &backend) : CommManager(backend) {}
  bool CreateGroupSync(const std::string &, const std::vector<unsigned int> &) const override { return true; }
  bool DestroyGroup(const std::string &) const override { return true; }
  bool GetRankID(const std::string &, unsigned int *rank) const override {
    *rank = FromEnvironment("RANK_ID", 0);
    return true;
  }
  bool GetRankSize(const std::string &, unsigned int *ranks) const override {
    *ranks = FromEnvironment("RANK_SIZE", 1);
    return true;
  }
  uint32_t GetRank() override { return FromEnvironment("RANK_ID", 0); }
};

const bool registered = [] {
  mindspore::MsContext::RegisterInitFunc("Ascend", [](mindspore::MsContext *) {});
  for (const char *name : {"hccl", "Ascend", "CPU"}) {
    mindspore::CommManager::Register(name, std::make_shared<Pretended>(name));
  }
  return true;
}();
}  // namespace
