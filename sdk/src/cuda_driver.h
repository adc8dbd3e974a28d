// The few functions of the CUDA driver that are needed to feed TensorRT, out of libcuda.so.1. It comes with the
// driver, so nothing of a CUDA toolkit is needed to run, and its interface does not change with the toolkit's version.
#ifndef VIMDEPLOY_SDK_CUDA_DRIVER_H_
#define VIMDEPLOY_SDK_CUDA_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace vimdeploy {

// One device's primary context, which CUDA's runtime library, and so TensorRT, uses too. Kept for the process's life.
// Every function throws kMissing with the driver's words. They may be called from any thread, inside an Active.
class CudaDevice {
 public:
  // Throws kMissing when there is no driver or no such device.
  static const CudaDevice& Get(int id);

  int id() const { return id_; }
  int sm() const { return sm_; }  // 90 for compute capability 9.0
  const std::string& name() const { return name_; }

  void* Allocate(std::size_t bytes) const;
  void Free(void* memory) const noexcept;
  void* NewStream() const;  // does not wait for the default stream
  void DestroyStream(void* stream) const noexcept;
  void CopyIn(void* to, const void* from, std::size_t bytes, void* stream) const;
  void CopyOut(void* to, const void* from, std::size_t bytes, void* stream) const;
  void Synchronize(void* stream) const;

  // Between the two, what the calling thread gives `stream` is not run but recorded. EndCapture returns it, ready to be
  // launched, or throws; the stream is then as it was before.
  void BeginCapture(void* stream) const;
  void* EndCapture(void* stream) const;
  // Ends a recording that went wrong.
  void AbandonCapture(void* stream) const noexcept;
  void Launch(void* graph, void* stream) const;
  void DestroyGraph(void* graph) const noexcept;

  // Makes the device the calling thread's own while it lives.
  class Active {
   public:
    explicit Active(const CudaDevice& device);
    ~Active();
    Active(const Active&) = delete;
    Active& operator=(const Active&) = delete;
  };

 private:
  explicit CudaDevice(int id);

  int id_;
  int sm_ = 0;
  std::string name_;
  void* context_ = nullptr;
};

}  // namespace vimdeploy

#endif  // VIMDEPLOY_SDK_CUDA_DRIVER_H_
