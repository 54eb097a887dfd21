use tokio::sync::watch;

use crate::storage::InstanceId;

/// One instance from its enlistment until it stops or is fenced.
pub(crate) struct Epoch {
    pub(crate) instance: InstanceId,
    stage: watch::Sender<Stage>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Live,
    /// What is queued still goes out.
    Draining,
    /// Nothing is written as this instance any more.
    Over,
}

impl Epoch {
    pub(crate) fn new(instance: InstanceId) -> Self {
        Self { instance, stage: watch::Sender::new(Stage::Live) }
    }

    pub(crate) fn drain(&self) {
        self.reach(Stage::Draining);
    }

    pub(crate) fn end(&self) {
        self.reach(Stage::Over);
    }

    fn reach(&self, stage: Stage) {
        self.stage.send_if_modified(|now| std::mem::replace(now, stage.max(*now)) < stage);
    }

    pub(crate) fn is_over(&self) -> bool {
        *self.stage.borrow() == Stage::Over
    }

    pub(crate) async fn draining(&self) {
        self.reached(Stage::Draining).await;
    }

    pub(crate) async fn over(&self) {
        self.reached(Stage::Over).await;
    }

    async fn reached(&self, stage: Stage) {
        // The sender lives as long as `self`, so this can't fail.
        let _ = self.stage.subscribe().wait_for(|now| *now >= stage).await;
    }
}
