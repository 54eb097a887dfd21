use durable_sqlite::{Definition, Failure, Process, Host, memory::Memory};
use futures_util::{StreamExt, stream};
const STEPS: Definition<u32, u32> = Definition::new("steps");
async fn steps(proc: Process, steps: u32) -> Result<u32, Failure> {
    for n in 0..steps {
        proc.step(("step", n), || async { Ok::<_, Failure>(12345) }).await?;
    }
    Ok(steps)
}
#[tokio::main]
async fn main() {
    for _ in 0..5 {
    let host = Host::builder(Memory::new()).register(STEPS, steps).start().await.unwrap();
    let t = std::time::Instant::now();
    let all = stream::iter(0..20000).map(|n| { let host = host.clone(); async move {
        host.spawn(STEPS, format!("many-{n}"), &5).await.unwrap().output().await.unwrap(); } }).buffer_unordered(4000);
    all.for_each(|()| async {}).await;
    println!("{:.2} us/step", t.elapsed().as_secs_f64() * 1e6 / 100_000.0);
    }
}
