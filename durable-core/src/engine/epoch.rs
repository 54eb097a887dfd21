use super::ratchet::Ratchet;
use crate::storage::InstanceId;

/// One instance from its enlistment until it stops or is fenced.
pub(crate) struct Epoch {
    pub(crate) instance: InstanceId,
    stage: Ratchet<Stage>,
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
        Self { instance, stage: Ratchet::new(Stage::Live) }
    }

    pub(crate) fn drain(&self) {
        self.stage.reach(Stage::Draining);
    }

    pub(crate) fn end(&self) {
        self.stage.reach(Stage::Over);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.stage.now() == Stage::Over
    }

    pub(crate) async fn draining(&self) {
        self.stage.reached(Stage::Draining).await;
    }

    pub(crate) async fn over(&self) {
        self.stage.reached(Stage::Over).await;
    }
}
